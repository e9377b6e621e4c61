"""The report as one page that needs nothing else: no network, no script, light and dark."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evals.report import tables
from evals.report.cells import DENSE, FLOOR
from evals.report.markdown import MARKS
from evals.report.origin import Fact, model, origin
from evals.report.pictures import Picture
from evals.report.reading import HOW_TO_READ
from evals.report.style import variables
from evals.report.summary import Summary
from evals.report.table import Table

HERE = Path(__file__).parent


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the page; `folded` hides each table behind its title."""

    id: str
    title: str
    text: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    folded: bool = False

    @property
    def filled(self) -> bool:
        return any((self.figures, self.tables, self.notes, self.facts))


def page(summary: Summary, figures: Sequence[Picture]) -> str:
    """The HTML page, with the figures in it."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    css = Markup((HERE / "page.css").read_text(encoding="utf-8") + variables())
    return environment.get_template("page.html").render(
        css=css,
        model=model(summary),
        lead=_lead(summary),
        tiles=_tiles(summary),
        sections=[each for each in _sections(summary, figures) if each.filled],
        marks={name: mark.strip() for name, mark in MARKS.items()},
    )


def _lead(summary: Summary) -> str:
    every = {each.method for each in summary.costs} | {each.method for each in summary.measured}
    methods = len(every - {DENSE.method, FLOOR.method})
    suites = sorted({line.suite for line in summary.cells} | {m.suite for m in summary.measured})
    return (
        f"Suites: {', '.join(suites)}. {methods} sparse {'methods' if methods != 1 else 'method'}, "
        "beside dense attention on the same prompts. Families stand apart, and what is bad is "
        "shown too."
    )


def _tiles(summary: Summary) -> list[Fact]:
    good = sum(line.reason is None for line in summary.cells)
    errors = sum(each.questions for each in summary.failures)
    gaps = len(tables.gaps(summary).rows)
    return [
        Fact("answers", f"{summary.questions:,}"),
        Fact("cells that discriminate", f"{good} of {len(summary.cells)}"),
        Fact("incomplete comparisons", f"{gaps:,}"),
        Fact("errors", f"{errors:,}"),
    ]


def _sections(summary: Summary, figures: Sequence[Picture]) -> list[Section]:
    def drawn(*beginnings: str) -> list[Picture]:
        return [each for each in figures if each.title.startswith(beginnings)]

    return [
        Section(
            id="families", title="Families", text=HOW_TO_READ[0],
            figures=drawn("Difference"), tables=_some(tables.families(summary)),
        ),
        Section(id="curves", title="Budgets and lengths", figures=drawn("Score")),
        Section(id="heat-maps", title="Needles by depth and length", figures=drawn("Needles")),
        Section(
            id="tasks", title="Tasks", tables=_some(*tables.tasks(summary)), folded=True,
            text="Every task at every length; a table for each family.",
        ),
        Section(
            id="measures", title="Fidelity and speed", figures=drawn("Fidelity"),
            tables=_some(*tables.measures(summary)), folded=True,
        ),
        Section(id="costs", title="Time and bytes", tables=_some(tables.cost(summary))),
        Section(
            id="failures", title="Errors and gaps",
            tables=_some(tables.failures(summary), tables.gaps(summary)),
        ),
        Section(id="reading", title="How to read it", notes=HOW_TO_READ),
        Section(id="origin", title="How it was made", facts=origin(summary)),
    ]  # fmt: skip


def _some(*made: Table) -> list[Table]:
    return [each for each in made if each.rows]
