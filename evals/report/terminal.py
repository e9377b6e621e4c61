"""Tables on the terminal."""

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from evals.report.table import Cell, Row, Table

WIDTH = 1000  # no number is cut where a terminal is narrow: it wraps lines itself
TEXT = 72  # of a label or note, before it is folded
STYLES = {"": "", "worse": "red", "better": "green"}


def show(tables: list[Table]) -> None:
    """Print them on stdout; what two rows share is said once."""
    console = Console(highlight=False, markup=False, width=WIDTH)
    for table in tables:
        if table.rows:
            console.print(_rich(table))
            console.print()


def _rich(table: Table) -> RichTable:
    made = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
    for label in table.labels:
        made.add_column(label, overflow="fold", max_width=TEXT)
    for head in table.heads:
        made.add_column(head, justify="right", no_wrap=True)
    noted = any(row.note for row in table.rows)
    if noted:
        made.add_column("not discriminative", overflow="fold", max_width=TEXT)
    before: Row | None = None
    for row in table.rows:
        labels = _labels(row, before)
        note = [row.note if row.note and any(labels[:2]) else ""] if noted else []
        made.add_row(*labels, *map(_text, row.cells), *note, style="dim" if row.note else "")
        before = row
    return made


def _labels(row: Row, before: Row | None) -> list[str]:
    """Labels, but for the first ones that are those of the row before."""
    labels = list(row.labels)
    for at, label in enumerate(before.labels[:-1] if before else ()):
        if label != labels[at]:
            break
        labels[at] = ""
    return labels


def _text(cell: Cell) -> Text:
    return Text("\n".join(cell.lines), style=STYLES[cell.mark])
