"""`headrace-eval generate`: prompts of a RULER task as JSON lines, in RULER's own form."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from engine.errors import ConfigError
from evals.prompt import prompt_tokens
from evals.ruler import TASKS, RulerSuite
from evals.settings import tokens
from evals.task import Sample


def add(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--task", required=True, choices=TASKS, help="one of RULER's thirteen")
    parser.add_argument(
        "--length", required=True, metavar="L",
        help="tokens of a prompt and its answer at most, as 4096 or 4k",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=20, metavar="N", help="samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, metavar="S", help="(%(default)s)")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR",
        help="folder or hub id of the tokenizer, or of the model that it belongs to",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true", help="leave room for the tokenizer's chat template"
    )
    parser.add_argument(
        "--haystack", metavar="FILE",
        help="text that needles are hidden in (reference pages of the Python language)",
    )  # fmt: skip
    for name, task in (("squad", "qa_1"), ("hotpotqa", "qa_2")):
        parser.add_argument(
            f"--{name}", metavar="DATA",
            help=f"rows of {task}: a .json or .jsonl file, a folder with one, or with what the "
            f"package datasets saved, or NAME[:CONFIG] on the hub ($HEADRACE_DATA/{name})",
        )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help="JSON lines: index, input, outputs, answer_prefix, length (of the prompt and the "
        "task's new tokens)",
    )  # fmt: skip


def run(args: Namespace) -> int:
    """Write the file, whole or not at all."""
    # torch and transformers take seconds, which --help must not
    from engine.commands.session import read_text
    from engine.model.loader import load_tokenizer, locate

    if args.count < 1:
        raise ConfigError(f"the count must be at least 1, got {args.count}")
    if args.out.exists() and not args.out.is_file():  # /dev/null would be replaced
        raise ConfigError(f"--out names a file for the prompts, got a folder or device: {args.out}")
    length = tokens(args.length)
    tokenizer = load_tokenizer(locate(args.tokenizer))
    if tokenizer is None:
        raise ConfigError(f"{args.tokenizer} has no tokenizer")
    haystack = None if args.haystack is None else read_text(args.haystack)
    suite = RulerSuite(args.seed, haystack, args.squad, args.hotpotqa, chat=args.chat)
    samples = suite.samples(tokenizer, args.task, length, args.count)
    used = _write(args, _rows(tokenizer, samples))
    fill = used / args.count / length
    print(f"{args.out}: {args.count} samples, {fill:.1%} of the length used", file=sys.stderr)
    return 0


def _rows(tokenizer: Any, samples: Iterator[Sample]) -> Iterator[dict[str, Any]]:
    for index, sample in enumerate(samples):
        turn = sample.turns[0]
        yield {
            "index": index,
            "input": sample.context + turn.question,
            "outputs": list(turn.outputs),
            "answer_prefix": turn.prefix,
            "length": prompt_tokens(tokenizer, sample) + turn.max_new_tokens,
        }


def _write(args: Namespace, rows: Iterator[dict[str, Any]]) -> int:
    """Rows to the file; the sum of their lengths."""
    part = args.out.with_name(f"{args.out.name}.part")
    used = 0
    console = Console(stderr=True)
    shown = track(
        rows,
        args.task,
        args.count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in shown:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                used += row["length"]
        os.replace(part, args.out)
    finally:
        part.unlink(missing_ok=True)
    return used
