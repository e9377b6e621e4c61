"""The command `headrace-eval`: what can be asked for. The commands are in `evals.commands`.

Results go to stdout, everything else to stderr. The exit status is 0 if all is well, 1 for what a
user can set right (said in one line), 2 for a wrong command line, 130 for Ctrl-C.
"""

import importlib
import sys
from collections.abc import Sequence

from engine.cli import Parser, exit_status, open_streams

COMMANDS = {
    "run": "ask a model the questions of suites, by several methods, and note what came of it",
    "report": "tables, files, plots and a page of what runs found",
    "generate": "write prompts of a RULER task to a file",
    "score": "score predictions that are in a file",
    "traces": "replay request traces through the store's eviction policies",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(words).parse_args(words)
    return exit_status("headrace-eval", f"evals.commands.{args.command}", args)


def build_parser(words: Sequence[str]) -> Parser:
    """All commands, and the options of the one that is asked for: others are not imported."""
    parser = Parser(
        prog="headrace-eval",
        description="What a method of long-context inference costs, and what it loses.",
        epilog="headrace-eval COMMAND --help says more, with examples.",
    )
    parser.add_version()
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if words[:1] == [name]:
            importlib.import_module(f"evals.commands.{name}").add(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
