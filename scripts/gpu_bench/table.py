"""The lines of a run as tables in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

Line = dict[str, Any]
Column = tuple[str, Callable[[Line], str]]


def number(field: str, form: str, factor: float = 1.0) -> Callable[[Line], str]:
    """A field in this form; empty where a line has none."""

    def show(line: Line) -> str:
        value = line.get(field)
        return "" if value is None else format(value * factor, form)

    return show


def text(*fields: str) -> Callable[[Line], str]:
    return lambda line: ", ".join(str(line[field]) for field in fields if field in line)


def outcome(line: Line) -> str:
    """What went wrong, or if a target was reached."""
    if "error" in line:
        return str(line["error"]).splitlines()[0][:80]
    if "skipped" in line:
        return f"skipped: {line['skipped']}"[:80]
    if "reached" in line:
        return f"{'reaches' if line['reached'] else 'misses'} {line['target']:.0%}"
    return "agrees" if line.get("agrees") else ""


def over(line: Line) -> str:
    """Ratios to the best that there was before, where a line compares."""
    ratios = line.get("over_dense") or line.get("faster") or {}
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())


MS: Column = ("ms", number("median_s", ".3f", 1e3))
END: Column = ("", outcome)
PARTS: dict[str, tuple[str, list[Column]]] = {
    "kernels": (
        "Kernels",
        [
            ("kernel", text("name")),
            ("batch", text("batch")),
            MS,
            ("MB moved", number("moved_bytes", ".1f", 1e-6)),
            ("GB/s", number("gbps", ".0f")),
            ("of a copy", number("share_of_copy", ".0%")),
            ("TFLOP/s", number("tflops", ".0f")),
            END,
        ],
    ),
    "decode": (
        "Decode",
        [
            ("context", text("tokens")),
            ("method", text("name")),
            ("hits", text("hits")),
            ("batch", text("batch")),
            MS,
            ("tokens/s", number("tokens_per_s", ".1f")),
            ("of the bound", number("share_of_bound", ".0%")),
            ("peak GiB", number("peak_bytes", ".1f", 2**-30)),
            END,
        ],
    ),
    "copies": (
        "Copies that show",
        [
            ("way", text("name")),
            ("context", text("tokens")),
            ("batch", text("batch")),
            ("of a step", number("exposed", ".1%")),
            END,
        ],
    ),
    "prefill": (
        "Prefill",
        [
            ("way", text("name")),
            ("tokens", text("tokens")),
            ("s", number("median_s", ".2f")),
            ("peak GiB", number("peak_bytes", ".1f", 2**-30)),
            ("× the fastest dense", over),
            END,
        ],
    ),
    "blend": (
        "Blending",
        [
            ("way", text("name")),
            ("s", number("median_s", ".3f")),
            ("charged", number("charged", ".1%")),
            ("× as fast as a full prefill", over),
            END,
        ],
    ),
    "codebook": (
        "Training codebooks",
        [
            ("codebook", text("name")),
            ("keys on", text("keys_on")),
            ("s", number("seconds", ".2f")),
            ("mean error", number("mean_error", ".4f")),
            END,
        ],
    ),
}


def tables(lines: Sequence[Line]) -> str:
    """One table for each part that has lines."""
    found = []
    for part, (title, columns) in PARTS.items():
        mine = [line for line in lines if line["part"] == part]
        if mine:
            head = [name for name, _ in columns]
            rows = [[show(line) for _, show in columns] for line in mine]
            listed = [head, ["---"] * len(head), *rows]
            found.append("\n".join([f"### {title}", "", *map(_row, listed)]))
    return "\n\n".join(found)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
