"""The report as data: CSV, a row a score or measure, and JSON."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from evals.report.summary import Summary

SCORES = (
    "level", "suite", "family", "task", "length", "method", "budget", "score", "dense",
    "difference", "low", "high", "kept_tokens", "index_bytes", "samples", "tried", "errors",
    "cells", "not_discriminative",
)  # fmt: skip
MEASURES = (
    "suite", "source", "family", "task", "length", "method", "budget", "measure", "mean", "low",
    "high", "samples",
)  # fmt: skip


def scores_csv(summary: Summary) -> str:
    """Every score: of cells, of families at one length, of families."""
    levels = {"cell": summary.cells, "length": summary.lengths, "family": summary.families}
    rows = []
    for level, lines in levels.items():
        for line in lines:
            place: dict[str, Any] = {"level": level, "suite": line.suite, "family": line.family}
            place |= {"task": line.task, "length": line.length, "not_discriminative": line.reason}
            rows += [place | msgspec.structs.asdict(score) for score in line.scores]
    return _csv(SCORES, rows)


def measures_csv(summary: Summary) -> str:
    """Every measure of fidelity and speed, those of single heads too."""
    rows = []
    for each in summary.measured:
        place = {k: v for k, v in msgspec.structs.asdict(each).items() if k != "means"}
        for name, mean in each.means.items():
            rows.append(place | {"measure": name} | msgspec.structs.asdict(mean))
    return _csv(MEASURES, rows)


def as_json(summary: Summary) -> str:
    """All of it."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=1).decode() + "\n"


def _csv(heads: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
