"""Tables as data: what the terminal, the Markdown file and the page show, each in its way."""

from typing import Literal, NamedTuple

import msgspec

Mark = Literal["", "worse", "better"]


class Cell(NamedTuple):
    """Lines of text: the number that matters, then what stands beside it.

    Args:
        mark: on which side of zero its interval lies wholly, for better or worse than dense.
    """

    lines: tuple[str, ...]
    mark: Mark = ""


class Row(NamedTuple):
    """A row.

    Args:
        labels: what it is about, one for each label column.
        note: why its numbers are to be ignored; None where they are not.
    """

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    note: str | None = None


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows under heads: first those of the labels (left), then those of the numbers (right)."""

    title: str
    labels: tuple[str, ...]
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def plain(*texts: str) -> tuple[Cell, ...]:
    """A cell for each text."""
    return tuple(Cell((text,)) for text in texts)
