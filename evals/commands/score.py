"""`headrace-eval score`: scores of predictions that are in files, without a model."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evals.report.table import Row, Table, plain
from evals.report.terminal import show
from evals.scored import Score, score_file


class Found(NamedTuple):
    """Scores of one file."""

    file: str
    scores: list[Score]


def add(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+",
        help="folder of a run or its records.jsonl; or JSON lines with a prediction (pred, "
        "prediction or response) beside outputs (RULER), answers and all_classes (LongBench), or "
        "answer, difficulty and length (LongBench v2)",
    )  # fmt: skip
    parser.add_argument(
        "--task", metavar="NAME",
        help="RULER's task or LongBench's data set (the row's `task` or `dataset`, else the "
        "name of the file: hotpotqa.jsonl)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the result as one JSON line")


def run(args: Namespace) -> int:
    """Print the mean score of every task."""
    found = [Found(name, score_file(Path(name), args.task)) for name in args.files]
    if args.json:
        print(json.dumps([_plain(file, score) for file, scores in found for score in scores]))
    else:
        for file, scores in found:
            print(file, flush=True)  # not as the table's title, which wraps at the table's width
            show([_table(scores)])
    return 0


def _plain(file: str, score: Score) -> dict[str, object]:
    numbers = {"samples": score.samples, "empty": score.empty, "score": score.score}
    group = {k: v for k, v in score.group._asdict().items() if v is not None}
    return {"file": file} | group | numbers


def _table(scores: Sequence[Score]) -> Table:
    rows = [
        Row(
            tuple("" if part is None else str(part) for part in score.group),
            plain(f"{score.score:.2f}", str(score.samples), str(score.empty)),
        )
        for score in scores
    ]
    return Table(
        title="",
        labels=("suite", "task", "length", "method", "budget"),
        heads=("score", "samples", "empty"),
        rows=tuple(rows),
    )
