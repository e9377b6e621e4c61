"""Heat maps of a report: needles by depth and length, a figure a task and budget."""

import re
from collections.abc import Sequence
from pathlib import Path

from evals.heatmap import Grid, draw_heat_map
from evals.record import NO_CONTEXT
from evals.report import wording as say
from evals.report.cells import DENSE, Asked, rank
from evals.report.pictures import Picture, embedded
from evals.report.summary import Depth

CAPTION = (
    "Mean score by depth (0 is the beginning of the context) and length; red is 0, amber 50, green "
    "100 in every panel."
)


def heat_maps(depths: Sequence[Depth], folder: Path) -> list[Picture]:
    """Draw them into `folder`, a PNG and a CSV each; dense stands in each, the floor in none."""
    known = [each for each in depths if each.method != NO_CONTEXT]
    return [
        _figure(folder, task, budget, [each for each in known if each.task == task])
        for task in sorted({each.task for each in known})
        for budget in _budgets([each for each in known if each.task == task])
    ]


def _budgets(depths: Sequence[Depth]) -> list[float | None]:
    found = {each.budget for each in depths if each.budget is not None}
    ordered: list[float | None] = [*sorted(found, key=lambda each: (each >= 1, each))]
    return ordered or [None]


def _figure(folder: Path, task: str, budget: float | None, depths: Sequence[Depth]) -> Picture:
    shown = [each for each in depths if each.budget == budget or each.method == DENSE.method]
    methods = sorted({Asked(each.method, each.budget) for each in shown}, key=rank)
    panels = {
        asked.method: Grid.of(
            (each.length, each.depth, each.score)
            for each in shown
            if (each.method, each.budget) == asked
        )
        for asked in methods
    }
    name = "-".join(re.findall(r"\w+", f"needles {task} {'' if budget is None else budget}"))
    path = folder / f"{name}.png"
    draw_heat_map(path, panels)
    title = f"Needles: {task}" + ("" if budget is None else f", budget {say.budget(budget)}")
    return embedded(path, title, CAPTION)
