"""All that a report says, as data: what the tables, files and plots are made from."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from evals.record import Record
from evals.report.cells import cells_of
from evals.report.lines import Line, cell_lines, family_lines, judged
from evals.report.load import Run, Runs
from evals.report.measures import Cost, Measured, costs, measured

MANY, ROWS = 24, 11  # rows of a heat map that are still read; those that more depths share


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of error: questions of a task that a method could not be asked."""

    suite: str
    task: str
    length: int
    method: str
    budget: float | None
    error: str
    questions: int
    example: str


class Depth(msgspec.Struct, frozen=True, kw_only=True):
    """Mean score of a method at one depth and length: a field of a heat map."""

    task: str
    method: str
    budget: float | None
    length: int
    depth: float
    score: float
    questions: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A report.

    Args:
        records, repeated: read, and given way to later ones of the same key.
        lengths: of families, one line for each of their lengths.
    """

    runs: tuple[Run, ...]
    records: int
    repeated: int
    families: list[Line]
    lengths: list[Line]
    cells: list[Line]
    depths: list[Depth]
    measured: list[Measured]
    costs: list[Cost]
    failures: list[Failure]

    @property
    def questions(self) -> int:
        return sum(each.questions for each in self.costs)


def summarize(runs: Runs) -> Summary:
    """What the records say; the same for the same records in any order."""
    cells = judged(cells_of(runs.records))
    lines = cell_lines(cells)  # before the families: they use what is resampled there
    return Summary(
        runs=runs.runs,
        records=len(runs.records),
        repeated=runs.repeated,
        families=family_lines(cells),
        lengths=family_lines(cells, by_length=True),
        cells=lines,
        depths=_depths(runs.records),
        measured=measured(runs.records),
        costs=costs(runs.records),
        failures=_failures(runs.records),
    )


def _depths(records: Iterable[Record]) -> list[Depth]:
    places = defaultdict(list)  # of a task: depths and scores
    for record in records:
        depth = record.extra.get("depth")
        if record.score is not None and isinstance(depth, int | float):
            asked = record.method, record.budget, record.length
            places[record.task].append((asked, float(depth), record.score))
    fields = defaultdict(list)
    for task, found in places.items():
        row = _rows({depth for _, depth, _ in found})
        for (method, budget, length), depth, score in found:
            fields[task, method, budget, length, row[depth]].append(score)
    return [
        Depth(
            task=task, method=method, budget=budget, length=length, depth=depth,
            score=sum(scores) / len(scores), questions=len(scores),
        )
        for (task, method, budget, length, depth), scores in sorted(
            fields.items(), key=lambda field: (*field[0][:2], field[0][2] or 0.0, *field[0][3:])
        )
    ]  # fmt: skip


def _rows(depths: set[float]) -> dict[float, float]:
    """The row of a heat map that each depth is in: its own, or where there are too many, as where
    each sample has one of its own, the nearest of `ROWS`."""
    if len(depths) <= MANY:
        return {depth: depth for depth in depths}
    return {depth: round(depth * (ROWS - 1)) / (ROWS - 1) for depth in depths}


def _failures(records: Iterable[Record]) -> list[Failure]:
    kinds = defaultdict(list)
    for record in records:
        if record.error is not None:
            place = record.suite, record.task, record.length
            kinds[(*place, record.method, record.budget, record.error)].append(record.id)
    return [
        Failure(
            suite=suite, task=task, length=length, method=method, budget=budget,
            error=error, questions=len(ids), example=min(ids),
        )
        for (suite, task, length, method, budget, error), ids in sorted(
            kinds.items(), key=lambda kind: (*kind[0][:4], kind[0][4] or 0.0, kind[0][5])
        )
    ]  # fmt: skip
