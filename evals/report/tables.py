"""The tables of a report."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from evals.report import wording as say
from evals.report.cells import DENSE, FLOOR, Asked, rank
from evals.report.lines import Line, Score
from evals.report.measures import Cost, Mean, Measured
from evals.report.summary import Failure, Summary
from evals.report.table import Cell, Mark, Row, Table, plain

LISTED = ("score", "difference", "95 %", "fetched", "index B", "samples")


def families(summary: Summary) -> Table:
    """Averages of families, methods side by side."""
    return _matrix("Families", ("family", "cells", "budget"), summary.families)


def tasks(summary: Summary) -> list[Table]:
    """Every task and length, a table for each family of a suite."""

    def name(line: Line) -> tuple[str, str]:
        return line.suite, line.family

    return [
        _matrix(" · ".join(group), ("task", "length", "budget"), list(lines))
        for group, lines in groupby(summary.cells, name)
    ]


def listed(title: str, lines: Sequence[Line]) -> Table:
    """The same, a row for each method: for a page that is narrow."""
    rows = []
    for line in lines:
        for score in line.scores or (None,):
            rows.append(_listed(_where(line), line.reason, score))
    heads = "task" if lines and lines[0].task else "family"
    labels = (heads, "length" if heads == "task" else "cells", "method", "budget")
    return Table(title=title, labels=labels, heads=LISTED, rows=tuple(rows))


def measures(summary: Summary) -> list[Table]:
    """Fidelity and speed, a table for each; measures of single heads stay in the file."""
    found = []
    for name, group in groupby(summary.measured, lambda each: f"{each.suite} · {each.source}"):
        lines = list(group)
        names = measure_names(lines)
        rows = tuple(
            Row(
                (each.task, say.length(each.length), each.method, say.budget(each.budget)),
                tuple(_mean(each.means.get(name)) for name in names),
            )
            for each in lines
        )
        labels = ("task", "length", "method", "budget")
        found.append(Table(title=name, labels=labels, heads=names, rows=rows))
    return found


def measure_names(lines: Iterable[Measured]) -> tuple[str, ...]:
    """Measures over all heads, in the order in which they were made."""
    return tuple(dict.fromkeys(name for each in lines for name in each.means if "/" not in name))


def cost(summary: Summary) -> Table:
    """Time and bytes of the answers."""
    heads = ("questions", "prefill", "first token", "tokens/s", "moved a step", "peak memory")
    labels = ("suite", "length", "method", "budget")
    rows = tuple(map(_cost, summary.costs))
    return Table(title="What the answers took", labels=labels, heads=heads, rows=rows)


def failures(summary: Summary) -> Table:
    """Errors, by kind."""
    rows = tuple(map(_failure, summary.failures))
    labels = ("task", "length", "method", "budget", "error")
    return Table(title="Errors", labels=labels, heads=("questions",), rows=rows)


def gaps(summary: Summary) -> Table:
    """Methods that have fewer samples in a cell than were tried there."""
    rows = tuple(
        Row(
            (line.task or "", say.length(line.length), score.method, say.budget(score.budget)),
            plain(f"{score.samples} of {score.tried}", str(score.errors)),
        )
        for line in summary.cells
        for score in line.scores
        if score.samples < score.tried
    )
    labels = ("task", "length", "method", "budget")
    return Table(title="Incomplete", labels=labels, heads=("samples", "errors"), rows=rows)


def _matrix(title: str, labels: tuple[str, ...], lines: Sequence[Line]) -> Table:
    asked = sorted({Asked(s.method, s.budget) for line in lines for s in line.scores}, key=rank)
    methods = tuple(dict.fromkeys(each.method for each in asked))
    rows = [row for line in lines for row in _rows(line, methods)]
    return Table(title=title, labels=labels, heads=methods, rows=tuple(rows))


def _rows(line: Line, methods: Sequence[str]) -> Iterable[Row]:
    """One for each budget; dense and the floor, which have none, stand in each."""
    found = {score.budget for score in line.scores if score.budget is not None}
    budgets: list[float | None] = [*sorted(found, key=lambda each: (each >= 1, each))]
    for budget in budgets or [None]:
        scores = [line.of(Asked(each, budget)) or line.of(Asked(each, None)) for each in methods]
        yield Row((*_where(line), say.budget(budget)), tuple(map(_cell, scores)), line.reason)


def _where(line: Line) -> tuple[str, str]:
    if line.task is not None:
        return line.task, say.length(line.length)
    return f"{line.suite} · {line.family}", f"{line.cells} of {line.cells + line.left_out}"


def _cell(score: Score | None) -> Cell:
    if score is None:
        return Cell((say.NONE,))
    lines = [say.points(score.score)]
    if (score.method, score.budget) not in (DENSE, FLOOR):
        lines += [say.signed(score.difference), say.span(score.low, score.high)]
    if score.kept_tokens is not None:
        index = "" if score.index_bytes is None else f" · {say.count(score.index_bytes)} B"
        lines.append(f"{say.count(score.kept_tokens)} tok{index}")
    if score.samples < score.tried:
        lines.append(f"{score.samples} of {score.tried} samples")
    if score.errors:
        lines.append(say.errors(score.errors))
    return Cell(tuple(lines), _mark(score))


def _mark(score: Score) -> Mark:
    if score.method in (DENSE.method, FLOOR.method) or score.low is None or score.high is None:
        return ""
    return "worse" if score.high < 0 else "better" if score.low > 0 else ""


def _listed(where: tuple[str, str], reason: str | None, score: Score | None) -> Row:
    if score is None:
        return Row((*where, say.NONE, say.NONE), plain(*[say.NONE] * len(LISTED)), reason)
    samples = str(score.samples)
    if score.samples < score.tried:
        samples += f" of {score.tried}"
    if score.errors:
        samples += f", {say.errors(score.errors)}"
    dense = (score.method, score.budget) == DENSE
    cells = plain(
        say.points(score.score),
        say.NONE if dense else say.signed(score.difference),
        say.NONE if dense else say.span(score.low, score.high),
        say.count(score.kept_tokens),
        say.count(score.index_bytes),
        samples,
    )
    marked = (cells[0], cells[1]._replace(mark=_mark(score)), *cells[2:])
    return Row((*where, score.method, say.budget(score.budget)), marked, reason)


def _mean(mean: Mean | None) -> Cell:
    if mean is None:
        return Cell((say.NONE,))
    if mean.low is None or mean.high is None:
        return Cell((say.number(mean.mean),))
    return Cell((say.number(mean.mean), f"[{say.number(mean.low)}, {say.number(mean.high)}]"))


def _cost(each: Cost) -> Row:
    return Row(
        (each.suite, say.length(each.length), each.method, say.budget(each.budget)),
        plain(
            f"{each.questions:,}",
            say.seconds(each.prefill_s),
            say.seconds(each.ttft_s),
            say.NONE if each.decode_tok_s is None else f"{each.decode_tok_s:,.1f}",
            say.size(each.bytes_moved),
            say.size(each.peak_mem),
        ),
    )


def _failure(each: Failure) -> Row:
    where = (each.task, say.length(each.length), each.method, say.budget(each.budget))
    return Row((*where, f"{each.error} (e.g. {each.example})"), plain(f"{each.questions:,}"))
