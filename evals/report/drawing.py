"""What all plots share: small panels in a grid, one legend, no more ink than they need."""

import importlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from engine.errors import EngineError
from evals.report.style import FAINT, GRID, INK, PAPER

WIDTH = 11.4  # inches, of a page
HEIGHT = 2.4  # of a panel
COLUMNS = 3


def pyplot() -> Any:
    """matplotlib's, drawing into files. EngineError where it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError as error:
        raise EngineError(
            "drawing a report needs matplotlib: pip install 'headrace[evals]'"
        ) from error
    return importlib.import_module("matplotlib.pyplot")


def styled(name: str) -> AbstractContextManager[None]:
    """Within it, figures have a report's style. `name` keeps parts of drawings apart on a page."""
    settings = {
        "figure.facecolor": PAPER.light,
        "axes.facecolor": PAPER.light,
        "savefig.facecolor": PAPER.light,
        "text.color": INK.light,
        "axes.labelcolor": FAINT.light,
        "axes.edgecolor": GRID.light,
        "xtick.color": FAINT.light,
        "ytick.color": FAINT.light,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "axes.labelsize": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK.light,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID.light,
        "grid.linewidth": 0.7,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.labelcolor": INK.light,
        "text.parse_math": False,  # a name with dollars in it is a name
        "svg.hashsalt": name,
        "svg.fonttype": "none",
    }
    context: AbstractContextManager[None] = pyplot().rc_context(settings)
    return context


def panels(count: int, *, columns: int = COLUMNS, height: float = HEIGHT) -> Any:
    """A figure as wide as a page and `count` axes in a grid; the rest of the last row is empty."""
    rows = math.ceil(count / columns)
    figure, grid = pyplot().subplots(
        rows, columns, squeeze=False, layout="constrained",
        figsize=(WIDTH, height * rows + 0.4),
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def legend(figure: Any, axes: Iterable[Any]) -> None:
    """One for all panels, below them; each name once."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, name in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside lower left",
        ncols=9, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip


def steps(axes: Any, names: Sequence[str], label: str) -> None:
    """An axis of evenly spaced steps, one a name."""
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.3, len(names) - 0.7)
    axes.set_xlabel(label)
