#!/usr/bin/env python3
"""Make the tables of benchmarks/README.md from the newest lines under benchmarks/results/.

scripts/bench_table.py            writes the file
scripts/bench_table.py --check    exits 1 where the file says something else
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "README.md"
HEAD = """# Benchmarks

Made by `scripts/bench_table.py` from the newest lines under `results/`; every line there names its
commit, versions, device and shapes. Baseline and contender alternate in one run on the same inputs;
medians. Ratios carry over to other machines better than times do, and both move with whatever else
the machine does.

What no table shows was not measured; nothing was measured on a GPU yet.
"""


def decode(record: dict[str, Any]) -> str:
    """Tokens/s and memory of every contender at every length."""
    rows = [
        "| context | contender | tokens/s | ms, median | ms, p90 | peak MiB |",
        "|" + " --- |" * 6,
    ]
    for length, at in record["lengths"].items():
        for name, x in at["contenders"].items():
            mark = " (best of theirs)" if name == at["best"] else ""
            numbers = f"{x['tokens_per_s']:.2f} | {x['median_ms']:.1f} | {x['p90_ms']:.1f}"
            rows.append(f"| {length} | {name}{mark} | {numbers} | {x['peak_bytes'] / 2**20:.0f} |")
    ratios = [
        f"- {length} tokens: **{at['speedup']:.2f} ×** the best of theirs "
        f"(p10 {at['speedup_p10']:.2f}, p90 {at['speedup_p90']:.2f}); "
        f"peak memory {at['memory_ratio']:.3f} of theirs' least"
        for length, at in record["lengths"].items()
    ]
    about = (
        "Dense decode of one request against the caches and attentions of `transformers`, "
        f"{record['parameters'] / 1e6:.0f} M parameters\n"
        f"({record['model']['num_hidden_layers']} layers of Qwen3-0.6B, random), bf16, cache "
        "filled synthetically. `scripts/bench_decode.py`"
    )
    return "\n".join([about, "", *rows, "", *ratios])


def store(record: dict[str, Any]) -> str:
    """GB/s of the disk tier beside plain files and the raw disk."""
    rows = ["| GB/s | median | least | most |", "| --- | --- | --- | --- |"]
    for name, values in record["rounds"].items():
        middle = sorted(values)[len(values) // 2]
        rows.append(f"| {name} | {middle:.2f} | {min(values):.2f} | {max(values):.2f} |")
    summary = [
        f"- {name}: **{record[name]:.2f}**"
        for name in ("hot_get_gbps", "hot_get_vs_pread", "cold_get_vs_pread", "put_vs_files")
        if name in record
    ]
    about = (
        "The disk tier (LMDB) beside plain files and the raw disk: "
        f"{record['total_bytes'] / 2**30:.0f} GiB in values of {record['value_bytes'] / 2**20:.0f} "
        "MiB.\nA get ends in tensors, copied and verified; fresh means into memory that was never "
        "touched.\n1T, 2T, 4T: threads. `scripts/bench_store.py`"
    )
    return "\n".join([about, "", *rows, "", *summary])


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {"decode": decode, "store": store}


def page() -> str:
    """The whole file."""
    parts = [HEAD]
    for name, table in PARTS.items():
        record = newest(name)
        versions = ", ".join(
            f"{k} {record[k]}" for k in ("torch", "transformers", "lmdb") if k in record
        )
        where = f"{record['device']}, {' '.join(record.get('flags', []))}".rstrip(", ")
        source = f"{where}; {versions}; commit {record['commit'][:8]}; {record['date'][:10]}"
        parts.append(f"## {name.capitalize()}\n\n{table(record)}\n\n{source}\n")
    return "\n".join(parts)


def newest(name: str) -> dict[str, Any]:
    """The last line of the last results file of a benchmark."""
    file = sorted((ROOT / "benchmarks" / "results").glob(f"{name}_*.json*"))[-1]
    found: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])
    return found


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text() != page())
    TARGET.write_text(page())
