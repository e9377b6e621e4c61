"""What came of a soak as a table, for benchmarks/README.md."""

from collections.abc import Sequence
from statistics import median
from typing import Any


def soak(record: dict[str, Any]) -> str:
    """The thirds of a soak beside each other, and its curves."""
    windows = record["windows"]
    third = len(windows) // 3
    thirds = {"first": windows[:third], "second": windows[third:-third], "last": windows[-third:]}
    rows = ["| third | file / budget, most | memory MiB, median | read of a block ms, p50 | p99 |"]
    rows.append("|" + " --- |" * 5)
    rows += [f"| {name} | {' | '.join(_cells(record, part))} |" for name, part in thirds.items()]
    about = (
        f"A store at its disk budget ({record['budget_bytes'] / 2**30:.0f} GiB) for "
        f"{record['minutes']:.0f} minutes: {record['blocks_read']:,} blocks of 2 MiB read and "
        f"compared with\nwhat was written, {record['blocks_put']:,} put, {record['evictions']:,} "
        "evicted. Medians over windows of ten seconds. `scripts/soak`"
    )
    wrong = (
        "; ".join(record["wrong"]) or "every block was what had been written, and all stays flat"
    )
    return "\n".join([about, "", *rows, "", f"- {wrong}", "", "![](../docs/soak.png)"])


def _cells(record: dict[str, Any], windows: Sequence[dict[str, Any]]) -> list[str]:
    most = max(w["file_bytes"] for w in windows) / record["budget_bytes"]
    memory = median(w["resident_bytes"] for w in windows) / 2**20
    times = [1e3 * median(w[f"{of}_s"] for w in windows) for of in ("p50", "p99")]
    return [f"{most:.3f}", f"{memory:.0f}", *(f"{ms:.2f}" for ms in times)]
