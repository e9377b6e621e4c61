"""Colours and marks of methods in plots: told apart without colour, too; on light and on dark.

Plots are drawn for light paper. In a page, each colour becomes a CSS variable with two values.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from evals.record import NO_CONTEXT


class Colour(NamedTuple):
    """On light and on dark paper. Light ones name a colour: each has one dark one."""

    light: str
    dark: str


class Look(NamedTuple):
    """A method's line."""

    colour: Colour
    mark: str
    dash: str = "-"


PAPER = Colour("#ffffff", "#12181b")
INK = Colour("#1b2529", "#e4eaec")
FAINT = Colour("#5c6a70", "#94a3a9")
GRID = Colour("#e3e8ea", "#2a3439")
GREY = Colour("#7a868b", "#98a5ab")
LOOKS = {  # hues of Okabe and Ito (2008), moved until each holds 3:1 against its paper
    "dense": Look(INK, ""),
    "headrace": Look(Colour("#0a6c93", "#4fb6dd"), "o"),
    "oracle": Look(GREY, "D", "--"),
    "shadowkv": Look(Colour("#c2541b", "#ee8a4f"), "s"),
    "a2ats": Look(Colour("#00805f", "#35c39b"), "^"),
    "quest": Look(Colour("#a8487f", "#dd8cba"), "v"),
    "pqcache": Look(Colour("#8a6d00", "#d3b338"), "P"),
    NO_CONTEXT: Look(GREY, "", ":"),
}
OTHERS = (
    Look(Colour("#5d4fb3", "#a79cf0"), "X"),
    Look(Colour("#8b3a3a", "#e08a8a"), "<"),
    Look(Colour("#4c6b1f", "#a3c76d"), ">"),
)
COLOURS = {PAPER, INK, FAINT, GRID} | {each.colour for each in (*LOOKS.values(), *OTHERS)}


def look(method: str, methods: Sequence[str]) -> Look:
    """A method's; those that are no presets take turns."""
    if method in LOOKS:
        return LOOKS[method]
    return OTHERS[[each for each in methods if each not in LOOKS].index(method) % len(OTHERS)]


def adaptive(svg: str) -> str:
    """The drawing with variables in place of colours."""
    known = {each.light: f"var(--c{each.light[1:]})" for each in COLOURS}
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: known.get(found[0], found[0]), svg)


def variables() -> str:
    """CSS that gives the variables their values."""
    light, dark = (
        " ".join(f"--c{each.light[1:]}: {each[at]};" for each in sorted(COLOURS)) for at in (0, 1)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
