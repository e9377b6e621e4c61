"""Lines of a report: one cell, or several averaged, each method beside dense.

A difference is paired: over the samples that a method shares with dense, and no others. Cells in
which dense itself fails, or does as well without the context, tell methods apart by chance: they
are marked, and averages leave them out.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import TypeAlias

import msgspec
import numpy as np

from evals.record import Record
from evals.report.bootstrap import interval
from evals.report.cells import DENSE, FLOOR, Asked, Cell, rank

CEILING = 30.0  # a dense score below it is too near the floor to tell methods apart
Judged: TypeAlias = "tuple[Cell, str | None]"


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A method at a budget. Scores are 0..100, differences points, over samples shared with dense.

    Args:
        dense: of the same samples.
        low, high: of the difference, 95 %; None where a cell has one sample only.
        samples: that count here, of `tried`.
        errors: questions that could not be asked.
        cells: that are averaged.
        kept_tokens: a KV head attends to, mean.
        index_bytes: per token and KV head, mean.
    """

    method: str
    budget: float | None
    score: float | None
    dense: float | None
    difference: float | None
    low: float | None
    high: float | None
    samples: int
    tried: int
    errors: int
    cells: int
    kept_tokens: float | None
    index_bytes: float | None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A cell, or an average over cells of a family.

    Args:
        task: None where several are averaged.
        length: tokens; None where several are averaged.
        reason: why it is not discriminative; None where it is.
        cells: that are averaged; `left_out` more of the family are not discriminative.
    """

    suite: str
    family: str
    task: str | None
    length: int | None
    reason: str | None
    cells: int
    left_out: int
    scores: tuple[Score, ...]

    def of(self, asked: Asked) -> Score | None:
        """The score of a method at a budget, where it was tried."""
        return next((each for each in self.scores if (each.method, each.budget) == asked), None)


def judged(cells: Sequence[Cell]) -> list[Judged]:
    """Cells, each with the reason why it is not discriminative, or None."""
    return [(cell, _reason(cell)) for cell in cells]


def cell_lines(cells: Sequence[Judged]) -> list[Line]:
    """A line for each cell."""
    lines = []
    for cell, reason in cells:
        suite, family, task, length = cell.place
        scores = _scores([cell])
        lines.append(
            Line(
                suite=suite, family=family, task=task, length=length,
                reason=reason, cells=1, left_out=0, scores=scores,
            )
        )  # fmt: skip
    return lines


def family_lines(cells: Sequence[Judged], *, by_length: bool = False) -> list[Line]:
    """Means over a family's discriminative cells, each with the same weight.

    Args:
        by_length: one for each length, rather than one over all of them.
    """

    def group(each: Judged) -> tuple[str, str, int]:
        suite, family, _, length = each[0].place
        return suite, family, length if by_length else 0

    families = groupby(sorted(cells, key=group), group)
    return [
        _family(list(members), suite, family, length if by_length else None)
        for (suite, family, length), members in families
    ]


def _family(cells: Sequence[Judged], suite: str, family: str, length: int | None) -> Line:
    good = [cell for cell, reason in cells if reason is None]
    why = cells[0][1] if len(cells) == 1 else f"none of its {len(cells)} cells is"
    return Line(
        suite=suite,
        family=family,
        task=None,
        length=length,
        reason=None if good else why,
        cells=len(good),
        left_out=len(cells) - len(good),
        scores=_scores(good),
    )


def _scores(cells: Sequence[Cell]) -> tuple[Score, ...]:
    asked = {asked for cell in cells for asked in cell.asked}
    return tuple(_score(cells, each) for each in sorted(asked, key=rank))


def _score(cells: Sequence[Cell], asked: Asked) -> Score:
    """Means over cells of the means over samples; resampled within each cell."""
    pairs = [(cell, *cell.pairs(asked)) for cell in cells]
    found = [(cell, own, dense) for cell, own, dense in pairs if len(own)]
    paired = [(cell, own - dense) for cell, own, dense in found if len(dense)]
    several = paired and min(len(difference) for _, difference in paired) > 1
    ends = interval(np.mean([cell.resampled(asked) for cell, _ in paired], 0)) if several else None
    records = [list(cell.shared(asked).values()) for cell, _, _ in found]
    return Score(
        method=asked.method,
        budget=asked.budget,
        score=_mean([own.mean() for _, own, _ in found]),
        dense=_mean([dense.mean() for _, _, dense in found if len(dense)]),
        difference=_mean([difference.mean() for _, difference in paired]),
        low=round(ends[0], 4) if ends else None,
        high=round(ends[1], 4) if ends else None,
        samples=sum(len(own) for _, own, _ in found),
        tried=sum(len(cell.samples) for cell in cells),
        errors=sum(cell.errors.get(asked, 0) for cell in cells),
        cells=len(found),
        kept_tokens=_noted(records, "kept_tokens"),
        index_bytes=_noted(records, "index_bytes"),
    )


def _noted(cells: Sequence[Sequence[Record]], name: str) -> float | None:
    """The mean over cells, as of scores, of what their records note."""
    noted = [[x for record in cell if (x := getattr(record, name)) is not None] for cell in cells]
    return _mean([float(np.mean(values)) for values in noted if values])


def _reason(cell: Cell) -> str | None:
    """Why the cell tells nothing about methods, in words; None where it does."""
    dense, floor = _score([cell], DENSE), _score([cell], FLOOR)
    if dense.score is None:
        return "no dense score"
    if dense.score < CEILING:
        return f"dense {dense.score:.1f} is below {CEILING:.0f}"
    highest = floor.difference if floor.high is None else floor.high
    if highest is not None and highest >= 0:
        return f"dense {dense.score:.1f} is within noise of {floor.score:.1f} without the context"
    return None


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None
