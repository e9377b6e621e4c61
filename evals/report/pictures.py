"""Plots as files and as parts of a page."""

import io
import re
import struct
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from evals.report.drawing import pyplot, styled
from evals.report.plots import Plot
from evals.report.style import adaptive

DPI = 160  # of the files, and of heat maps
PIXELS = 96  # an inch on a page


class Picture(NamedTuple):
    """A figure of the page: itself, as HTML, and what is said below it."""

    title: str
    caption: str
    body: Markup


def draw(plots: Sequence[Plot], folder: Path) -> list[Picture]:
    """Draw each, into a PNG in `folder` (created) and for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(plot, folder / f"{plot.name}.png") for plot in plots]


def embedded(path: Path, title: str, caption: str) -> Picture:
    """A PNG file of `DPI`, for the page."""
    png = path.read_bytes()
    (pixels,) = struct.unpack(">I", png[16:20])  # its header's width
    image = Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}">')
    data = b64encode(png).decode("ascii")
    return Picture(title, caption, image.format(data, title, round(pixels * PIXELS / DPI)))


def _draw(plot: Plot, path: Path) -> Picture:
    with styled(plot.name):
        figure = plot.draw()
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        out: Any = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        width = round(figure.get_figwidth() * PIXELS)
        pyplot().close(figure)
    return Picture(plot.title, plot.caption, _inline(out.getvalue().decode(), plot, width))


def _inline(svg: str, plot: Plot, width: int) -> Markup:
    """The drawing as an element of the page, in the page's colours and with its name."""
    body = svg[svg.index("<svg") :]
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib gives every drawing a box"
    inner = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|\n\s*", " ", rest, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)  # not unique on a page of several
    name = Markup.escape(f"{plot.title}: plot; its numbers are in the tables")
    opening = f'<svg {box[0]} width="{width}" role="img" aria-label="{name}">'
    return Markup(opening + adaptive(inner))
