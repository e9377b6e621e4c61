"""A run: every sample of a plan, asked in every way, and noted at once; or gone on with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from engine.engine import Engine
from engine.errors import ConfigError
from engine.sparse.compiled import compile_ahead
from evals.answer import Answers
from evals.record import Journal, Record
from evals.registry import haystack_text, make_suite, measurement, parse
from evals.settings import RunSettings
from evals.task import Sample, Suite
from evals.trial import FAILURES, failed, one_line
from evals.ways import DENSE, FLOOR, Way


class Cell(NamedTuple):
    """A task at a length, whose samples are answered or measured."""

    suite: Suite
    name: str  # of the suite
    measurement: str | None
    task: str
    length: int

    @property
    def shown(self) -> str:
        """For people who wait."""
        measured = f"{self.measurement} of " if self.measurement else ""
        return f"{measured}{self.name} {self.task} {self.length}"


class Step(NamedTuple):
    """So much of a cell is settled; `new` unless it was before, or there are no such samples."""

    cell: Cell
    tokens: int
    new: bool = True


def plan(settings: RunSettings, haystack: str | None = None) -> list[Cell]:
    """All cells, in the order in which they run.

    Args:
        haystack: see `evals.registry.haystack_text`; read here where it was not.

    Raises:
        ConfigError: no such suite, no suite has such a task, or data is missing.
    """
    asked = [parse(name) for name in dict.fromkeys(settings.suite)]
    text = haystack_text(settings) if haystack is None else haystack
    names = dict.fromkeys(x.suite for x in asked)
    suites = {name: make_suite(name, settings, text) for name in names}
    known = list(dict.fromkeys(task for suite in suites.values() for task in suite.tasks))
    if unknown := [task for task in settings.tasks if task not in known]:
        raise ConfigError(f"no task {', '.join(unknown)}; there are {', '.join(known)}")
    return [
        Cell(suites[name], name, measured, task, length)
        for name, measured in asked
        for task in suites[name].tasks
        if not settings.tasks or task in settings.tasks
        for length in dict.fromkeys(settings.lengths)
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """What is asked, of which model, and where it is noted.

    Args:
        cells: see `plan`.
        ways: see `evals.ways`; without the floor, which is for answers only.
        limit: samples of a cell.
        per_head: see `RunSettings`.
    """

    engine: Engine
    journal: Journal
    cells: Sequence[Cell]
    ways: Sequence[Way]
    limit: int
    per_head: bool = False

    @property
    def tokens(self) -> int:
        """The sum over all steps, as far as it is known before."""
        return sum(self.limit * self._weight(cell) for cell in self.cells)

    def steps(self) -> Iterator[Step]:
        """Do what is left to be done, step by step."""
        if any(way.method.sparse for way in self.ways):
            compile_ahead()
        for cell in self.cells:
            left, error = self.limit, None
            try:
                for sample in self._samples(cell):
                    settle = self._measure if cell.measurement else self._answer
                    yield from settle(cell, sample)
                    left -= 1
            except ConfigError as raised:
                error = one_line(raised)
            self._note_cell(cell, error)
            yield Step(cell, left * self._weight(cell), new=False)

    def _samples(self, cell: Cell) -> Iterator[Sample]:
        return cell.suite.samples(self.engine.tokenizer, cell.task, cell.length, self.limit)

    def _weight(self, cell: Cell) -> int:
        """Tokens of a sample in all ways: what it costs, more or less."""
        return cell.length * (len(self.ways) + (cell.measurement is None))

    def _answer(self, cell: Cell, sample: Sample) -> Iterator[Step]:
        answers = Answers(self.engine, sample)
        for way in (*self.ways, FLOOR):
            new = not self._has(sample, cell.name, [way])
            if new:
                self.journal.add(_scored(cell.suite, sample, answers.records(way)))
            yield Step(cell, cell.length, new)

    def _measure(self, cell: Cell, sample: Sample) -> Iterator[Step]:
        assert cell.measurement is not None
        new = not self._has(sample, cell.measurement, self.ways)
        if new:  # in all ways at once, as they are compared step by step
            try:
                measure = measurement(cell.measurement, per_head=self.per_head)
                found = list(measure(self.engine, sample, self.ways))
            except FAILURES as error:
                found = failed(sample, cell.measurement, self.ways, error)
            self.journal.add(found)
        yield Step(cell, self._weight(cell), new)

    def _note_cell(self, cell: Cell, error: str | None) -> None:
        """A record of a cell whose samples cannot be made; and one that they can, where it was."""
        record = Record(
            id=f"{cell.name}/{cell.task}/{cell.length}",
            suite=cell.measurement or cell.name,
            task=cell.task,
            family="",
            length=cell.length,
            turn=0,
            method=DENSE.name,
            budget=None,
            error=error,
        )
        if error is not None or self.journal.failed(record.key):
            self.journal.add([record])

    def _has(self, sample: Sample, suite: str, asked: Sequence[Way]) -> bool:
        turns = range(len(sample.turns))
        keys = [(suite, sample.id, turn, way.name, way.budget) for way in asked for turn in turns]
        return all(map(self.journal.has, keys))


def _scored(suite: Suite, sample: Sample, records: Sequence[Record]) -> Iterator[Record]:
    for record in records:
        score = None
        if record.error is None:
            score = suite.score(sample, record.turn, record.prediction)
        yield msgspec.structs.replace(record, score=score)
