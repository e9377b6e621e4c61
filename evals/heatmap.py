"""Heat maps of needles: score by depth and length, a panel for each method."""

import csv
import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError

COLOURS = ("#F0496E", "#EBB839", "#0CD79F")  # red, amber, green: 0, 50, 100
MISSING = "#D9D9D9"
COLUMNS = 3  # of panels, at most
DPI = 160
INK = "#1A1A1A"


@dataclass(frozen=True, slots=True)
class Grid:
    """Mean scores of a method.

    Args:
        lengths, depths: ascending; depths 0 (the text's beginning) to 1.
        scores: 0..100, [depths, lengths]; NaN where nothing was asked.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores: NDArray[np.float64]

    @classmethod
    def of(cls, points: Iterable[tuple[int, float, float]]) -> "Grid":
        """From (length, depth, score), any number of each length and depth, in any order."""
        found: dict[tuple[float, int], list[float]] = defaultdict(list)
        for length, depth, score in points:
            found[depth, length].append(score)
        lengths = tuple(sorted({length for _, length in found}))
        depths = tuple(sorted({depth for depth, _ in found}))
        means = [
            [float(np.mean(found.get((depth, length), [np.nan]))) for length in lengths]
            for depth in depths
        ]
        return cls(lengths, depths, np.array(means).reshape(len(depths), len(lengths)))


def draw_heat_map(path: Path, panels: Mapping[str, Grid]) -> None:
    """Write `path`, a PNG, and the numbers behind it beside it, as CSV.

    Every panel has the same scale of 0 to 100, and depth 0 on top; what was not asked is grey.

    Raises:
        EngineError: nothing to draw, or matplotlib is missing.
    """
    if not panels or not all(grid.scores.size for grid in panels.values()):
        raise EngineError(f"{path} would be empty: a heat map needs scores with a depth")
    _write_csv(path.with_suffix(".csv"), panels)
    figure, axes = _figure(panels)
    colours = _colours()
    for ax, (name, grid) in zip(axes, panels.items(), strict=False):
        image = _panel(ax, name, grid, colours)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("score", fontsize=8, color=INK)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # the same bytes for the same scores


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise EngineError(
            "drawing a heat map needs matplotlib: pip install 'headrace[evals]'"
        ) from error


def _figure(panels: Mapping[str, Grid]) -> tuple[Any, list[Any]]:
    """A figure, and its axes, at least one for each panel."""
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    width = max(1.6 + 0.62 * max(len(grid.lengths) for grid in panels.values()), 3.0)
    height = 1.1 + 0.24 * max(len(grid.depths) for grid in panels.values())
    size = (columns * width + 1.0, rows * height + 0.5)
    figure = _matplotlib("figure").Figure(size, layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _colours() -> Any:
    colours = _matplotlib("colors").LinearSegmentedColormap.from_list("score", COLOURS)
    return colours.with_extremes(bad=MISSING)


def _panel(ax: Any, name: str, grid: Grid, colours: Any) -> Any:
    masked = np.ma.masked_invalid(grid.scores)
    image = ax.imshow(masked, colours, aspect="auto", vmin=0, vmax=100, interpolation="nearest")
    ax.set_title(name, loc="left", fontsize=10, color=INK, parse_math=False)
    ax.set_xlabel("tokens", fontsize=8, color=INK)
    ax.set_ylabel("depth", fontsize=8, color=INK)
    ax.set_xticks(range(len(grid.lengths)), [_tokens(x) for x in grid.lengths], fontsize=8)
    ax.set_yticks(range(len(grid.depths)), [f"{x:.3g} %" for x in _percent(grid)], fontsize=8)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    for (row, column), score in np.ndenumerate(grid.scores):
        if np.isfinite(score):  # colours alone do not tell everybody
            ax.text(column, row, f"{score:.0f}", ha="center", va="center", fontsize=7, color=INK)
    return image


def _percent(grid: Grid) -> list[float]:
    return [round(100 * depth, 1) for depth in grid.depths]


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _write_csv(path: Path, panels: Mapping[str, Grid]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("panel", "length", "depth", "score"))
        for name, grid in panels.items():
            for (row, column), score in np.ndenumerate(grid.scores):
                if np.isfinite(score):
                    place = grid.lengths[column], grid.depths[row]
                    writer.writerow((name, *place, round(float(score), 4)))
