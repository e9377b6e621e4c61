"""The windows of a soak as three curves."""

import importlib
from pathlib import Path
from typing import Any


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw file, memory and latency over time. Needs matplotlib (headrace[evals])."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")  # only who draws needs it
    windows, budget = record["windows"], record["budget_bytes"]
    minutes = [record["minutes"] * (n + 1) / len(windows) for n in range(len(windows))]
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.4))
    for panel, title, lines in zip(
        panels,
        ("data file / budget", "resident memory, MiB", "read of a block, ms"),
        (
            {"": [w["file_bytes"] / budget for w in windows]},
            {"": [w["resident_bytes"] / 2**20 for w in windows]},
            {of: [1e3 * w[f"{of}_s"] for w in windows] for of in ("p50", "p99")},
        ),
        strict=True,
    ):
        for label, values in lines.items():
            panel.plot(minutes, values, label=label, linewidth=1.4)
        panel.set_title(title)
        panel.set_xlabel("minutes")
        panel.grid(alpha=0.3)
    panels[0].axhline(1.05, color="0.5", linestyle="--", linewidth=1)
    for panel in panels:
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panels[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
