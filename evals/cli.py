"""The command `headrace-eval`: what can be asked for. The commands are in `evals.commands`.

Results go to stdout, everything else to stderr. The exit status is 0 if all is well, 1 for what a
user can set right (said in one line), 2 for a wrong command line, 130 for Ctrl-C.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from engine.cli import Parser
from engine.errors import EngineError
from kvstore.errors import StoreError

COMMANDS = {
    "run": "ask a model the questions of suites, by several methods, and note what came of it",
    "report": "tables, files, plots and a page of what runs found",
    "generate": "write prompts of a RULER task to a file",
    "score": "score predictions that are in a file",
    "traces": "replay request traces through the store's eviction policies",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is shown as `?`
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(words).parse_args(words)
    try:
        status = int(importlib.import_module(f"evals.commands.{args.command}").run(args))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (EngineError, StoreError, OSError, ImportError) as error:
        print(f"headrace-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return status


def build_parser(words: Sequence[str]) -> Parser:
    """All commands, and the options of the one that is asked for: others are not imported."""
    parser = Parser(
        prog="headrace-eval",
        description="What a method of long-context inference costs, and what it loses.",
        epilog="headrace-eval COMMAND --help says more, with examples.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if words[:1] == [name]:
            importlib.import_module(f"evals.commands.{name}").add(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
