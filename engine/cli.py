"""The command `headrace`: what can be asked for. The commands themselves are in `engine.commands`.

Results go to stdout, everything else to stderr. The exit status is 0 if all is well, 1 for what a
user can set right (said in one line), 2 for a wrong command line, 130 for Ctrl-C.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, TypeAlias

from engine.errors import EngineError
from kvstore.errors import StoreError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def add_version(self) -> None:
        """`--version`, which is that of the package."""
        try:
            found = version("headrace")
        except PackageNotFoundError:  # run from its sources
            found = "of a folder that is not installed"
        self.add_argument("--version", action="version", version=f"{self.prog} {found}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    open_streams()
    args = build_parser().parse_args(argv)
    # only the command that is asked for is imported: --help must not wait for torch
    return exit_status("headrace", f"engine.commands.{args.command}", args)


def exit_status(prog: str, module: str, args: argparse.Namespace) -> int:
    """Of the `run` of a command's module; what a user can set right is said in one line."""
    try:
        status = int(importlib.import_module(module).run(args))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (EngineError, StoreError, OSError, ImportError) as error:  # a missing extra, too
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return status


def open_streams() -> None:
    """Closed streams are empty ones, and what a terminal cannot show is shown as `?`."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  as long as the process
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, stream)


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="headrace", description="Long-context inference with a tiered KV store.")
    parser.add_version()
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_chat(commands)
    _add_ask(commands)
    _add_rag(commands)
    _add_serve(commands)
    _add_trace(commands)
    _add_demo(commands)
    _add_doctor(commands)
    _add_store(commands)
    return parser


def _add_generate(commands: Commands) -> None:
    parser = _command(commands, "generate", "continue a text")
    parser.add_argument("prompt", nargs="?", help="the text; - reads it from standard input")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the text from a file")
    _add_model_options(parser)
    _add_sampling_options(parser)


def _add_chat(commands: Commands) -> None:
    parser = _command(commands, "chat", "talk; an empty line is ignored, /exit or Ctrl-D ends")
    _add_model_options(parser)
    _add_sampling_options(parser)


def _add_ask(commands: Commands) -> None:
    parser = _command(commands, "ask", "ask about files; the next question reuses their KV")
    parser.add_argument("question")
    parser.add_argument(
        "--text", metavar="FILE", action="append", required=True,
        help="a text to read before the question; may be repeated",
    )  # fmt: skip
    _add_model_options(parser)
    _add_sampling_options(parser)


def _add_rag(commands: Commands) -> None:
    parser = commands.add_parser("rag", help="read documents once, and ask about them in any order")
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    add = actions.add_parser("add", help="read documents, and store their KV")
    add.add_argument("paths", nargs="+", metavar="PATH", help="text files, or folders of them")
    ask = actions.add_parser("ask", help="answer from the chunks that fit a question")
    ask.add_argument("question")
    choice = ask.add_mutually_exclusive_group()
    choice.add_argument("--chunks", type=int, metavar="N", help="how many to read (5)")
    choice.add_argument("--chunk", action="append", metavar="ID", help="read this one; repeatable")
    ask.add_argument("--policy", help="which reused tokens are computed afresh (the config's)")
    ask.add_argument("--share", type=float, help="how many of them (the config's)")
    list_ = actions.add_parser("list", help="show the documents")
    delete = actions.add_parser("delete", help="forget documents, with their KV")
    delete.add_argument("ids", nargs="+", metavar="ID", help="as listed, or the path of a file")
    for action in (add, ask, list_, delete):
        action.set_defaults(command="rag")
        _add_model_options(action, decodes=action in (add, ask))
        action.add_argument("--chunk-tokens", type=int, default=512, help="(%(default)s)")
        action.add_argument("--instructions", default="", help="read before all chunks")
    _add_sampling_options(ask)


def _add_serve(commands: Commands) -> None:
    parser = _command(commands, "serve", "answer over HTTP, as OpenAI does; see engine/serve")
    parser.add_argument("--host", help="address to listen at (the config's, else 127.0.0.1)")
    parser.add_argument("--port", type=int, help="0 for a free one (the config's, else 8000)")
    _add_model_options(parser, tells=False)


def _add_trace(commands: Commands) -> None:
    parser = _command(commands, "trace", "where the time of a server's last requests went")
    parser.add_argument(
        "id", nargs="?", metavar="ID",
        help="show this request's spans: a trace's id or its start, or an x-request-id",
    )  # fmt: skip
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    parser.add_argument("--key", help="an API key ($HEADRACE_API_KEY if not given)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--otlp", metavar="FILE", help="write OpenTelemetry's JSON; - is stdout")
    output.add_argument("--json", action="store_true", help="the result as one JSON line")


def _add_demo(commands: Commands) -> None:
    parser = _command(commands, "demo", "hide facts in a long text, ask, stop, and ask again")
    parser.add_argument(
        "trip", nargs="?", choices=("store", "rag"), default="store",
        help="one long prompt from the store, or documents in any order (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, help="length of a prompt (%(default)s)")
    parser.add_argument("--facts", type=int, default=5, help="facts to hide (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which text and facts (%(default)s)")
    _add_model_options(parser)


def _add_doctor(commands: Commands) -> None:
    parser = _command(commands, "doctor", "versions, devices, extras, and the store's health")
    _add_store_options(parser)


def _add_store(commands: Commands) -> None:
    parser = commands.add_parser("store", help="look after the KV on disk")
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    stat = actions.add_parser("stat", help="how much it holds")
    audit = actions.add_parser("audit", help="verify the tables and every record")
    audit.add_argument("--repair", action="store_true", help="delete what is damaged")
    clear = actions.add_parser("clear", help="delete all blocks, of every tenant and model")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    clear.add_argument(
        "--documents", action="store_true", help="delete the texts of documents on record, too"
    )
    export = actions.add_parser("export", help="write blocks to a file")
    export.add_argument("file", metavar="FILE")
    export.add_argument("--tenant", metavar="TAG", help="of this tenant alone, as stat shows it")
    export.add_argument(
        "--identity", metavar="HEX", help="of the models whose digest begins so (ModelIdentity)"
    )
    import_ = actions.add_parser(
        "import", help="take in the blocks of such a file; only of one that you trust"
    )
    import_.add_argument("file", metavar="FILE")
    bench = actions.add_parser("bench", help="how fast this disk is, in some seconds")
    bench.add_argument("--mib", type=int, default=256, help="to write and read (%(default)s)")
    top = actions.add_parser("top", help="watch a server's tiers, or this store's folder")
    top.add_argument("--url", help="of a running server")
    top.add_argument("--key", help="an API key that sees all ($HEADRACE_API_KEY if not given)")
    top.add_argument("--interval", type=float, default=2.0, help="seconds (%(default)s)")
    top.add_argument("--once", action="store_true", help="show it once")
    compact = actions.add_parser("compact", help="make the file as small as what it holds")
    for action in (stat, audit, clear, export, import_, bench, top, compact):
        action.set_defaults(command="store")
        _add_store_options(action)


def _command(commands: Commands, name: str, description: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(command=name)
    return parser


def _add_store_options(parser: Parser, *, tells: bool = True) -> None:
    """Of a command that `tells` its result at the end, and where KV is."""
    parser.add_argument("--config", metavar="FILE", help="settings in TOML, see engine/config.py")
    parser.add_argument(
        "--store", metavar="DIR",
        help="folder for KV on disk (the config's, else $XDG_CACHE_HOME/headrace/store)",
    )  # fmt: skip
    if tells:
        parser.add_argument("--json", action="store_true", help="the result as one JSON line")


def _add_model_options(parser: Parser, *, decodes: bool = True, tells: bool = True) -> None:
    parser.add_argument(
        "--model", default="needle-tiny",
        help="folder or hub id (the %(default)s that comes along, which can only find needles)",
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter (PEFT): folder or hub id")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="the checkpoint's if not given"
    )
    parser.add_argument("--device", help="cpu or cuda[:N]; a GPU if there is one")
    if decodes:
        parser.add_argument(
            "--method", metavar="NAME",
            help="how decode attends: dense, headrace, shadowkv, ... (the config's, else dense)",
        )  # fmt: skip
        parser.add_argument(
            "--budget", type=float, metavar="N",
            help="tokens a sparse method attends to; below 1, the share of the prompt's",
        )  # fmt: skip
    _add_store_options(parser, tells=tells)
    parser.add_argument("--no-store", action="store_true", help="keep no KV on disk")
    parser.add_argument(
        "--remote", metavar="URL",
        help="Redis server to share KV through: redis://HOST, rediss://HOST, unix:///PATH",
    )  # fmt: skip


def _add_sampling_options(parser: Parser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="0 for all (%(default)s)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--stop", action="append", default=[], help="end before this; repeatable")


if __name__ == "__main__":
    sys.exit(main())
