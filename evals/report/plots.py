"""Plots of a report: differences to dense, scores against budget and length, fidelity."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from evals.record import NO_CONTEXT
from evals.report import wording as say
from evals.report.cells import DENSE, Asked
from evals.report.drawing import COLUMNS, legend, panels, steps
from evals.report.lines import Line, Score
from evals.report.measures import Mean, Measured
from evals.report.style import FAINT, Look, look
from evals.report.summary import Summary
from evals.report.tables import measure_names

DEFAULT = "headrace"  # drawn in front
FLAT = (DENSE.method, NO_CONTEXT)  # methods without a budget: the ceiling and the floor


class Plot(NamedTuple):
    """A figure; its file's name, and what it shows."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Any]


def plots(summary: Summary) -> Iterator[Plot]:
    """Those that the records have something for. Families that tell nothing are left out."""
    families = [line for line in summary.families if line.reason is None]
    lengths = [line for line in summary.lengths if line.reason is None]
    if any(each.method not in FLAT for line in families for each in line.scores):
        yield Plot("differences", "Difference to dense", DIFFERENCES, partial(_forest, families))
    if len(budgets_of(families)) > 1:
        yield Plot("budget", "Score against budget", CURVES, partial(_by_budget, families))
    if len({line.length for line in lengths}) > 1:
        yield Plot("length", "Score against length", CURVES, partial(_by_length, lengths))
    fidelity = [each for each in summary.measured if each.suite == "fidelity"]
    for (source, task), group in groupby(fidelity, lambda each: (each.source, each.task)):
        lines = [each for each in group if each.method not in FLAT]
        if not any(_differs(lines, name) for name in measure_names(lines)):
            continue
        longest = max(each.length for each in lines)
        where = say.budget(lines[0].budget)
        if len(budgets_of(lines)) > 1:
            lines = [each for each in lines if each.length == longest]
            where = f"{say.length(longest)} tokens"
        name = "-".join(["fidelity", source, *re.findall(r"\w+", task.lower())])
        title = f"Fidelity: {source} · {task}, {where}"
        yield Plot(name, title, FIDELITY, partial(_fidelity, lines))


DIFFERENCES = (
    "Points lost (left of zero) or won against dense, with 95 % paired bootstrap intervals; a row "
    "for each method and budget, families apart. Each panel has its own scale."
)
CURVES = (
    "The solid line without marks is dense, the dotted one the same questions without their "
    "context. Bars are 95 % intervals of the difference to dense."
)
FIDELITY = (
    "Against dense attention on the same tokens (teacher forcing). Bars are 95 % intervals over "
    "samples."
)


def budgets_of(lines: Sequence[Line | Measured]) -> list[float]:
    """All budgets, shares first."""
    found = set()
    for line in lines:
        scores: Sequence[Any] = line.scores if isinstance(line, Line) else (line,)
        found |= {each.budget for each in scores if each.budget is not None}
    return sorted(found, key=lambda each: (each >= 1, each))


def _methods(lines: Sequence[Line]) -> list[str]:
    """All methods, in the order of tables."""
    scores = [score for line in lines for score in line.scores]
    return list(dict.fromkeys(each.method for each in scores))


def _name(line: Line) -> str:
    return f"{line.suite} · {line.family}"


def _forest(lines: Sequence[Line]) -> Any:
    rows = _asked(lines)
    figure, axes = panels(len(lines), height=0.9 + 0.2 * len(rows))
    methods = _methods(lines)
    for at, (panel, line) in enumerate(zip(axes, lines, strict=True)):
        panel.axvline(0, color=FAINT.light, linewidth=1)
        for y, asked in enumerate(rows):
            score = line.of(asked)
            if score is not None and score.difference is not None:
                style = look(asked.method, methods)
                spread = _bars(score.difference, score.low, score.high)
                panel.errorbar(
                    score.difference, y, xerr=spread, color=style.colour.light,
                    fmt=style.mark or "o", markersize=4.5, linewidth=1.6,
                )  # fmt: skip
        names = [f"{each.method} {say.budget(each.budget)}" for each in rows]
        panel.set_yticks(range(len(rows)), names if at % COLUMNS == 0 else [""] * len(rows))
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.grid(axis="x")
        panel.set_title(_name(line))
        panel.set_xlabel("points")
    return figure


def _asked(lines: Sequence[Line]) -> list[Asked]:
    found = {Asked(each.method, each.budget): None for line in lines for each in line.scores}
    methods = _methods(lines)
    order = {method: at for at, method in enumerate(methods)}
    chosen = [each for each in found if each.method not in FLAT]
    return sorted(chosen, key=lambda each: (order[each.method], each.budget or 0.0))


def _by_budget(lines: Sequence[Line]) -> Any:
    figure, axes = panels(len(lines))
    methods, budgets = _methods(lines), budgets_of(lines)
    for panel, line in zip(axes, lines, strict=True):
        for method in methods:
            points = [
                (at, score)
                for at, budget in enumerate(budgets)
                if (score := line.of(Asked(method, None if method in FLAT else budget)))
            ]
            _curve(panel, points, method, methods)
        _scores(panel, _name(line))
        steps(panel, [say.budget(each) for each in budgets], "budget")
    legend(figure, axes)
    return figure


def _by_length(lines: Sequence[Line]) -> Any:
    families = list(dict.fromkeys(map(_name, lines)))
    budgets: list[float | None] = [*budgets_of(lines)] or [None]
    methods = _methods(lines)
    shown = [(family, budget) for family in families for budget in budgets]
    figure, axes = panels(len(shown), columns=len(budgets) if len(budgets) > 1 else COLUMNS)
    for panel, (family, budget) in zip(axes, shown, strict=True):
        own = [line for line in lines if _name(line) == family]
        lengths = sorted({line.length for line in own if line.length is not None})
        for method in methods:
            points = [
                (lengths.index(line.length), score)
                for line in own
                if line.length is not None
                and (score := line.of(Asked(method, None if method in FLAT else budget)))
            ]
            _curve(panel, points, method, methods)
        _scores(panel, family if len(budgets) == 1 else f"{family}, {say.budget(budget)}")
        steps(panel, [say.length(each) for each in lengths], "tokens")
    legend(figure, axes)
    return figure


def _curve(
    panel: Any, points: Sequence[tuple[int, Score]], method: str, methods: list[str]
) -> None:
    known = [(at, each) for at, each in points if each.score is not None]
    if not known:
        return
    style = look(method, methods)
    spread = [_bars(each.score or 0.0, *_ends(each, method)) for _, each in known]
    _line(panel, [(at, each.score or 0.0) for at, each in known], spread, method, style)


def _ends(score: Score, method: str) -> tuple[float | None, float | None]:
    """Ends of the interval of the difference, put on top of dense's score."""
    if method in FLAT or score.dense is None or score.low is None or score.high is None:
        return None, None
    return score.dense + score.low, score.dense + score.high


def _bars(value: float, low: float | None, high: float | None) -> tuple[list[float], list[float]]:
    """Lengths of an error bar to both sides."""
    if low is None or high is None:
        return [0.0], [0.0]
    return [max(value - low, 0.0)], [max(high - value, 0.0)]


def _scores(panel: Any, title: str) -> None:
    panel.set_ylim(-3, 103)
    panel.set_yticks(range(0, 101, 25))
    panel.set_title(title)


def _fidelity(lines: Sequence[Measured]) -> Any:
    """Against the budget where there are several, else against length."""
    by_budget = len(budgets_of(lines)) > 1
    names = [name for name in measure_names(lines) if _differs(lines, name)]
    lengths = sorted({each.length for each in lines})
    places: Sequence[Any] = budgets_of(lines) if by_budget else lengths
    methods = list(dict.fromkeys(each.method for each in lines))
    figure, axes = panels(len(names))
    for panel, name in zip(axes, names, strict=True):
        for method in methods:
            own = [each for each in lines if each.method == method]
            found = {e.budget if by_budget else e.length: e.means.get(name) for e in own}
            points = [(at, mean) for at, each in enumerate(places) if (mean := found.get(each))]
            _measure(panel, points, method, methods)
        panel.set_title(name)
        marks = map(say.budget if by_budget else say.length, places)
        steps(panel, list(marks), "budget" if by_budget else "tokens")
    legend(figure, axes)
    return figure


def _differs(lines: Sequence[Measured], name: str) -> bool:
    """Whether a measure tells methods apart, or there is one method alone."""
    found: dict[Any, set[float]] = {}
    for each in lines:
        if (mean := each.means.get(name)) is not None:
            found.setdefault((each.length, each.budget), set()).add(mean.mean)
    alone = len({each.method for each in lines}) == 1
    return bool(found) and (alone or any(len(means) > 1 for means in found.values()))


def _measure(
    panel: Any, points: Sequence[tuple[int, Mean]], method: str, methods: list[str]
) -> None:
    if not points:
        return
    style = look(method, methods)
    spread = [_bars(each.mean, each.low, each.high) for _, each in points]
    _line(panel, [(at, each.mean) for at, each in points], spread, method, style)


def _line(
    panel: Any,
    points: Sequence[tuple[int, float]],
    spread: Sequence[tuple[list[float], list[float]]],
    method: str,
    style: Look,
) -> None:
    """A method's curve with its error bars, which stay out of the legend."""
    x, y = zip(*points, strict=True)
    ink, front = style.colour.light, 4 if method == DEFAULT else 3
    panel.plot(
        x, y, label=method, color=ink, marker=style.mark or None, markersize=4.5,
        linestyle=style.dash, linewidth=2.2 if method == DEFAULT else 1.3, zorder=front,
    )  # fmt: skip
    bars = [[low for (low,), _ in spread], [high for _, (high,) in spread]]
    panel.errorbar(x, y, yerr=bars, fmt="none", ecolor=ink, elinewidth=0.8, zorder=front)
