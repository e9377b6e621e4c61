"""The report as Markdown: what a repository shows without anything else."""

from evals.report import tables
from evals.report.origin import origin
from evals.report.reading import HOW_TO_READ
from evals.report.summary import Summary
from evals.report.table import Cell, Row, Table

MARKS = {"": "", "worse": "▼ ", "better": "▲ "}


def markdown(summary: Summary) -> str:
    """The whole report, without its plots."""
    every = [
        tables.families(summary),
        *tables.tasks(summary),
        *tables.measures(summary),
        tables.cost(summary),
        tables.gaps(summary),
        tables.failures(summary),
    ]
    facts = "\n".join(f"- {fact.name}: {_escaped(fact.value)}" for fact in origin(summary))
    notes = "\n".join(f"- {note}" for note in HOW_TO_READ)
    body = "\n\n".join(_table(table) for table in every if table.rows)
    return f"# Evaluation report\n\n{facts}\n\n## How to read it\n\n{notes}\n\n{body}\n"


def _table(table: Table) -> str:
    heads = list(map(_escaped, (*table.labels, *table.heads)))
    rules = ["---"] * len(table.labels) + ["---:"] * len(table.heads)
    rows = [heads, rules, *map(_row, table.rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {_escaped(table.title)}\n\n{lines}"


def _row(row: Row) -> list[str]:
    labels = [_escaped(label) for label in row.labels]
    if row.note:
        labels[0] += f"<br>*not discriminative: {_escaped(row.note)}*"
    return [*labels, *map(_cell, row.cells)]


def _cell(cell: Cell) -> str:
    first, *rest = map(_escaped, cell.lines)
    return "<br>".join([first, *([MARKS[cell.mark] + rest[0], *rest[1:]] if rest else [])])


def _escaped(text: str) -> str:
    """Text as it is: no pipe ends a cell, and nothing is taken for a tag."""
    flat = " ".join(text.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
