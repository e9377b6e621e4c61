"""`headrace chat`: a conversation, each turn reusing the KV of those before."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress

from engine.commands.session import decoded, open_engine, progress, sampling, show
from engine.errors import PromptError

END = "/exit"


def run(args: Namespace) -> int:
    messages: list[dict[str, str]] = []
    with open_engine(args) as engine:
        for said in _turns():
            messages.append({"role": "user", "content": said})
            try:
                events = engine.stream(engine.render(messages), **sampling(args))
            except PromptError as error:  # nothing was generated
                if not sys.stdin.isatty():
                    raise
                progress().print(str(error), style="red")
                messages.pop()
                continue
            answer = show(events, as_json=args.json, strip=True)
            messages.append({"role": "assistant", "content": answer.text or ""})
    return 0


def _turns() -> Iterator[str]:
    """What the user says, until the end of the input or /exit."""
    for line in _typed() if sys.stdin.isatty() else _piped():
        if line.strip() == END:
            return
        if line.strip():
            yield line.strip()


def _piped() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield decoded(line, "standard input")


def _typed() -> Iterator[str]:
    """Lines from a terminal, with editing and history where the platform has them."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() uses it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
