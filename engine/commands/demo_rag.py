"""`headrace demo rag`: read documents, ask, stop, and ask in another order in a new process."""

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from engine.commands.session import busy, engine_config
from engine.demo import demo
from engine.demo.demo import DemoError, new_process
from engine.demo.rag import Answer, Job, Outcome, check

J = TypeVar("J", bound=demo.Job)


def run(args: Namespace) -> int:
    with store_folder(args) as folder:
        job = job_of(Job, args, folder, add=True)
        with busy(f"process 1 reads {args.facts} documents and answers"):
            first = _process(job, "process 1")
        with busy("process 1 has ended; process 2 answers in another order"):
            second = _process(msgspec.structs.replace(job, add=False), "process 2")
        check(first, second)
    numbers = _numbers(first, second)
    if args.json:
        print(json.dumps(numbers))
    else:
        times = {
            "full, s": [f"{answer.full_s:.3f}" for answer in second.answers],
            "blended, s": [f"{answer.ttft_s:.3f}" for answer in second.answers],
        }
        show(first, second, _summary(numbers), times)
    return 0 if first.correct == second.correct == len(first.answers) else 1


@contextmanager
def store_folder(args: Namespace) -> Iterator[str]:
    """The store of the demo: a temporary folder, or the one that is asked for."""
    if args.no_store:
        raise DemoError("the demo is about the store: leave --no-store out")
    if args.store is not None:
        yield str(args.store)
        return
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        yield folder


def _process(job: Job, name: str) -> Outcome:
    return new_process("engine.demo.rag_process", job, name, Outcome)


def job_of(kind: type[J], args: Namespace, folder: str, **more: Any) -> J:
    """What the options ask for, with the store in `folder`."""
    names = ("model", "adapter", "tokens", "facts", "seed", "dtype", "device")
    config = engine_config(Namespace(**vars(args) | {"store": folder}))
    return kind(config=config, **{name: getattr(args, name) for name in names}, **more)


def show(
    first: demo.Outcome | Outcome,
    second: demo.Outcome | Outcome,
    lines: Iterable[str],
    times: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """The answers of both processes side by side, with more columns if given; lines below."""
    table, times = Table(box=None, pad_edge=False), times or {}
    for column in ("What is the special magic number for", "hidden", "process 1", "process 2"):
        table.add_column(column)
    for column in times:
        table.add_column(column, justify="right")
    for one, two, *rest in zip(first.answers, second.answers, *times.values(), strict=True):
        table.add_row(f"{one.key}?", one.value, _verdict(one), _verdict(two), *rest)
    console = Console(highlight=False)
    console.print(table)
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True)


def _verdict(answer: demo.Answer | Answer) -> str:
    return (
        "[green]right[/]" if answer.right else f"[red]wrong[/]: {escape(repr(answer.text.strip()))}"
    )


def _numbers(first: Outcome, second: Outcome) -> dict[str, Any]:
    """The result as one flat record; times are medians over the answers of process 2."""
    ttft_s, full_s = (median(getattr(a, n) for a in second.answers) for n in ("ttft_s", "full_s"))
    last = second.answers[-1]
    return {
        "documents": second.documents,
        "chunks": second.chunks,
        "questions": len(second.answers),
        "correct_first": first.correct,
        "correct_second": second.correct,
        "prompt_tokens": last.prompt_tokens,
        "exact_tokens": last.exact_tokens,
        "reused_tokens": last.reused_tokens,
        "fresh_tokens": last.fresh_tokens,
        "charged": round(last.charged, 4),
        "add_s": round(first.add_s, 4),
        "ttft_s": round(ttft_s, 4),
        "ttft_full_s": round(full_s, 4),
        "ttft_ratio": round(full_s / ttft_s, 1),
        "disk_reads": second.disk_reads,
        "disk_bytes": second.disk_bytes,
        "reason": last.reason,
    }


def _summary(numbers: dict[str, Any]) -> Iterator[str]:
    n = Namespace(**numbers)
    yield f"documents             {n.documents:,} in {n.chunks:,} chunks, read in {n.add_s:.3f} s"
    yield (
        f"prompt                {n.prompt_tokens:,} tokens: {n.exact_tokens:,} in their place, "
        f"{n.reused_tokens:,} moved, {n.fresh_tokens:,} new"
    )
    yield f"computed afresh       {n.charged:.0%} of the moved ones"
    yield f"first token, full     {n.ttft_full_s:.3f} s  (process 2: prefill without the store)"
    yield f"first token, blended  {n.ttft_s:.3f} s  (process 2: KV moved and repaired)"
    yield f"ratio                 {n.ttft_ratio:.1f} times"
    yield f"KV on disk            {decimal(n.disk_bytes)}, read {n.disk_reads:,} times"
    yield f"why                   {n.reason}"
    yield "For every question, each process reads the documents in an order of its own."
