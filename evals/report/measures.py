"""What was measured rather than scored: fidelity and speed of methods, and what answers cost."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec
import numpy as np

from evals.record import Record
from evals.report.bootstrap import interval, resampled_means
from evals.report.cells import Asked, is_measurement, rank

FIELDS = ("ttft_s", "decode_tok_s", "bytes_moved", "peak_mem", "kept_tokens", "index_bytes")


class Mean(msgspec.Struct, frozen=True):
    """Of one measure over samples, with its 95 % interval; that is None for one sample."""

    mean: float
    low: float | None
    high: float | None
    samples: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """All measures of a method at a budget, on one task's samples of one length.

    Args:
        suite: what measured: "fidelity" or "speed".
        source: the suite that the samples are of.
    """

    suite: str
    source: str
    family: str
    task: str
    length: int
    method: str
    budget: float | None
    means: dict[str, Mean]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What answering took, of a method at a budget: medians over the questions of one length.

    Args:
        peak_mem: the largest.
    """

    suite: str
    length: int
    method: str
    budget: float | None
    questions: int
    prefill_s: float | None
    ttft_s: float | None
    decode_tok_s: float | None
    bytes_moved: float | None
    peak_mem: int | None


def measured(records: Iterable[Record]) -> list[Measured]:
    """Means of fidelity and speed, by suite, source, family, task, length, method and budget."""
    groups = defaultdict(list)
    for record in records:
        noted = record.error is None and record.family  # else it is a note of a cell
        if is_measurement(record) and noted:
            place = record.suite, record.id.partition("/")[0], record.family, record.task
            groups[*place, record.length, Asked(record.method, record.budget)].append(record)
    return [
        Measured(
            suite=suite, source=source, family=family, task=task, length=length,
            method=asked.method, budget=asked.budget, means=_means(group),
        )
        for (suite, source, family, task, length, asked), group in sorted(
            groups.items(), key=lambda item: (*item[0][:5], rank(item[0][5]))
        )
    ]  # fmt: skip


def costs(records: Iterable[Record]) -> list[Cost]:
    """Medians of what answers took, by suite, length, method and budget."""
    groups = defaultdict(list)
    for record in records:
        if record.score is not None:
            groups[record.suite, record.length, Asked(record.method, record.budget)].append(record)
    return [
        Cost(
            suite=suite, length=length, method=asked.method, budget=asked.budget,
            questions=len(group),
            prefill_s=_median([each.prefill_s for each in group]),
            ttft_s=_median([each.ttft_s for each in group]),
            decode_tok_s=_median([each.decode_tok_s for each in group]),
            bytes_moved=_median([each.bytes_moved for each in group]),
            peak_mem=max((e.peak_mem for e in group if e.peak_mem is not None), default=None),
        )
        for (suite, length, asked), group in sorted(
            groups.items(), key=lambda item: (*item[0][:2], rank(item[0][2]))
        )
    ]  # fmt: skip


def _means(group: Sequence[Record]) -> dict[str, Mean]:
    """Over samples, of each measure that any has, in their order, and of what a record notes."""
    values: dict[str, dict[str, list[float]]] = {}
    for record in sorted(group, key=lambda each: (each.id, each.turn)):
        noted = {name: getattr(record, name) for name in FIELDS}
        found = record.measures | {name: v for name, v in noted.items() if v is not None}
        for name, value in found.items():
            values.setdefault(name, {}).setdefault(record.id, []).append(value)
    return {name: _mean(name, list(samples.values())) for name, samples in values.items()}


def _mean(name: str, samples: Sequence[Sequence[float]]) -> Mean:
    means = np.array([sum(values) / len(values) for values in samples], dtype=np.float64)
    if len(means) < 2:
        return Mean(float(means.mean()), None, None, len(means))
    return Mean(float(means.mean()), *interval(resampled_means(means, name)), len(means))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
