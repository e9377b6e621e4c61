"""Cells: one task at one length, with the answers of every method at every budget to pair."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from engine.method import PRESETS
from evals.record import NO_CONTEXT, Record
from evals.report.bootstrap import resampled_means

Values: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Place: TypeAlias = "tuple[str, str, str, int]"  # suite, family, task, length
Turn: TypeAlias = "tuple[str, int]"  # id of a sample, number of its question
ORDER = (*PRESETS, NO_CONTEXT)  # dense, the default, those it is compared with, the floor


class Asked(NamedTuple):
    """A method at a budget: what is compared with dense. Shares are below 1, tokens above."""

    method: str
    budget: float | None


DENSE = Asked("dense", None)
FLOOR = Asked(NO_CONTEXT, None)


def rank(asked: Asked) -> tuple[int, str, float]:
    """Sorts by method, as tables show them, then by budget; the floor comes last."""
    known = ORDER.index(asked.method) if asked.method in ORDER else len(ORDER) - 2
    return known + (asked.method == NO_CONTEXT), asked.method, asked.budget or 0.0


@dataclass(slots=True)
class Cell:
    """Records of one task at one length; complete before the first `resampled`."""

    place: Place
    samples: set[str] = field(default_factory=set)
    answers: dict[Asked, dict[Turn, Record]] = field(default_factory=dict)
    errors: dict[Asked, int] = field(default_factory=dict)
    _resampled: dict[Asked, Values] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        asked = Asked(record.method, record.budget)
        self.samples.add(record.id)
        if record.error is not None:
            self.errors[asked] = self.errors.get(asked, 0) + 1
        elif record.score is not None:
            self.answers.setdefault(asked, {})[record.id, record.turn] = record

    @property
    def asked(self) -> list[Asked]:
        """Every method and budget that was tried here, in the order of tables."""
        return sorted(self.answers.keys() | self.errors.keys(), key=rank)

    def shared(self, asked: Asked) -> dict[Turn, Record]:
        """The answers to questions that dense answered too; all of them where dense has none."""
        own, dense = self.answers.get(asked, {}), self.answers.get(DENSE)
        return own if not dense else {turn: own[turn] for turn in own if turn in dense}

    def pairs(self, asked: Asked) -> tuple[Values, Values]:
        """Scores of the method and of dense, a value a sample: the mean of the shared questions."""
        shared, dense = self.shared(asked), self.answers.get(DENSE, {})
        own = {turn: _score(record) for turn, record in shared.items()}
        theirs = {turn: _score(dense[turn]) for turn in shared if turn in dense}
        return _by_sample(own), _by_sample(theirs)

    def resampled(self, asked: Asked) -> Values:
        """The method's mean difference to dense, resampled.

        The same draws for all methods, and for all lengths of a task: its samples of one number ask
        for the same needle at each, so they fail together.
        """
        if asked not in self._resampled:
            own, dense = self.pairs(asked)
            self._resampled[asked] = resampled_means(own - dense, repr(self.place[:3]))
        return self._resampled[asked]


def cells_of(records: Iterable[Record]) -> list[Cell]:
    """The cells of all records that answer a question or failed to, sorted by place.

    Measurements are no cell's (see `evals.report.measures`), nor are errors without a family,
    which are of samples that could not be made.
    """
    cells: dict[Place, Cell] = {}
    for record in records:
        failed = record.error is not None and record.family and not is_measurement(record)
        if record.score is not None or failed:
            place = record.suite, record.family, record.task, record.length
            cells.setdefault(place, Cell(place)).add(record)
    return [cells[place] for place in sorted(cells)]


def is_measurement(record: Record) -> bool:
    """Whether a record measures a method rather than scores its answer."""
    return bool(record.measures) or record.suite in ("fidelity", "speed")


def _by_sample(scores: dict[Turn, float]) -> Values:
    samples: dict[str, list[float]] = {}
    for (sample, _), score in sorted(scores.items()):
        samples.setdefault(sample, []).append(score)
    return np.array([sum(values) / len(values) for values in samples.values()], dtype=np.float64)


def _score(record: Record) -> float:
    assert record.score is not None, "cells hold records with a score"
    return record.score
