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

from engine_bench import tables as engine
from faulting.table import faults
from serve_bench import tables as serve
from soaking.table import soak
from store_bench import tables as store

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "README.md"
HEAD = """# Benchmarks

Made by `scripts/bench_table.py` from the newest lines under `results/`; every line there names its
commit, versions, device and shapes. Baseline and contender alternate in one run on the same inputs;
medians. Ratios carry over to other machines better than times do, and both move with whatever else
the machine does.

What no table shows was not measured; nothing was measured on a GPU yet.
"""


INPUTS = ("real", "clustered", "scattered", "flat", "sink", "drift")


def indexes(record: dict[str, Any]) -> str:
    """Attention mass that indexes find, at equal bytes and equal tokens."""
    rows = [f"| index | B/token | {' | '.join(INPUTS)} |", "|" + " --- |" * (2 + len(INPUTS))]
    for name, row in record["summary"].items():
        if name != "default":
            mark = "**" if name == record["summary"]["default"] else ""
            masses = " | ".join(f"{row[x]:.3f}" for x in INPUTS)
            rows.append(f"| {mark}{name}{mark} | {row['bytes_per_token']:g} | {masses} |")
    about = (
        "Attention mass of what is selected over that of the best selection, 2 % of the tokens, "
        f"{record['seeds']} seeds of planted\nevidence in {record['tokens']} tokens, and real "
        "text through both needle models. Bytes are a token's and KV head's.\n"
        "`scripts/bench_indexes.py`"
    )
    return "\n".join([about, "", *rows, "", "![mass by bytes](indexes.png)"])


def needles(record: dict[str, Any]) -> str:
    """Answers right, by method and budget."""
    parts = []
    for model, at in record["models"].items():
        cells = {(c["method"], c["budget"]): c for c in at["cells"]}
        dense = cells.pop(("dense", 1.0))
        budgets = list(dict.fromkeys(budget for _, budget in cells))
        rows = [f"| {model} | {' | '.join(f'{b:.1%}' for b in budgets)} |"]
        rows.append("|" + " --- |" * (1 + len(budgets)))
        for method in dict.fromkeys(name for name, _ in cells):
            mine = [cells[method, b] for b in budgets]
            shares = (f"{c['right'] / c['asked']:.2f} ({c['attended']:.0f})" for c in mine)
            rows.append(f"| {method} | {' | '.join(shares)} |")
        share = f"dense: {dense['right'] / dense['asked']:.2f} of {dense['asked']} questions"
        rank = f"; rank of shadowkv and lowrank+scalar+int4: {at['rank']} of 128"
        parts.append("\n".join([*rows, "", share + rank]))
    about = (
        "Share of answers right (tokens attended to per KV head): "
        f"{at['needles']} needles in {at['tokens']:,} tokens of "
        "real text, read densely,\nquestions and answers decoded sparsely, sinks (4) and window "
        f"(16) inside the budget. `scripts/bench_needles.py{' --long' * (at['tokens'] > 4096)}`"
    )
    return "\n\n".join([about, *parts])


def kvpress(record: dict[str, Any]) -> str:
    """Answers right after eviction."""
    rows = []
    for model, presses in record["summary"].items():
        shares = list(next(iter(presses.values())))
        rows += [f"| {model} | {' | '.join(f'{float(x):.0%}' for x in shares)} |"]
        rows += ["|" + " --- |" * (1 + len(shares))]
        rows += [f"| {name} | {' | '.join(map(str, x.values()))} |" for name, x in presses.items()]
        rows += [""]
    about = (
        f"The same texts and {record['questions']} questions through kvpress {record['kvpress']}, "
        "which evicts before it knows the questions:\nshare of answers right, by the share of the "
        "KV that is kept. `scripts/bench_kvpress.py`"
    )
    return "\n".join([about, "", *rows]).rstrip()


def blend(record: dict[str, Any]) -> str:
    """Seconds to the first token by policy, and what the controller chose."""
    rows = ["| | s, median | p90 | × the faster full prefill | charged |", "|" + " --- |" * 5]
    for column, at in record["seconds"].items():
        for name, values in at.items():
            middle, most = quantile(values, 0.5), quantile(values, 0.9)
            charged = record["charged"].get(name)
            share = "" if charged is None else f"{charged:.1%}"
            faster = f"{record['baseline_s'] / middle:.2f}"
            rows.append(f"| {column}, {name} | {middle:.3f} | {most:.3f} | {faster} | {share} |")
    notes = []
    for times, at in record["controller"].items():
        fixed = {name: value for name, value in at.items() if name != "controller"}
        best = min(fixed, key=lambda name: fixed[name])
        notes.append(
            f"- controller, loading {times} × as fast as a full prefill: {at['controller']:.2f} s, "
            f"**{at['controller'] / fixed[best]:.2f}** of the best fixed choice ({best})"
        )
    about = (
        f"Time to the first token of {record['chunks']} chunks of {record['chunk_tokens']} tokens "
        f"in a new order, loading included: a random Llama of\n"
        f"{record['model']['num_hidden_layers']} layers, bf16, {record['threads']} threads; "
        f"policies at {record['share']:.0%} charged, or the least they reach. Host: KV in memory; "
        "cold: on LMDB,\npages dropped. `scripts/bench_blend.py`"
    )
    return "\n".join([about, "", *rows, "", *notes]).rstrip()


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def blend_quality(record: dict[str, Any]) -> str:
    """KL and right answers by policy and charged share."""
    about = (
        f"Ten chunks that were cached one by one, read by `models/{record['model']}`; "
        f"{record['samples']} prompts of each kind.\nKL of the answer's first token to that after "
        "a full prefill, in nats, and share of right answers (in parentheses).\nA share that a "
        "policy cannot spend, or must exceed, is empty. `scripts/bench_blend_quality.py`"
    )
    tables = [_quality(name.replace("_", " "), at) for name, at in record["inputs"].items()]
    return "\n\n".join([about, "![KL by charged share](blend_quality.png)", *tables])


def _quality(title: str, found: dict[str, Any]) -> str:
    shares = sorted({s for points in found["rows"].values() for s in points}, key=float)
    rows = [f"| {title} | {' | '.join(shares)} |", "|" + " --- |" * (len(shares) + 1)]
    for policy, points in found["rows"].items():
        cells = [_point(points[s]) if s in points else "" for s in shares]
        rows.append(f"| {policy} | {' | '.join(cells)} |")
    if full := found.get("full"):
        rows += ["", f"Full prefill: {full['right']:.2f} right."]
    return "\n".join(rows)


def _point(point: dict[str, float]) -> str:
    right = f" ({point['right']:.2f})" if "right" in point else ""
    return f"{point['kl']:.4f}{right}"


def aot(record: dict[str, Any]) -> str:
    """Registers and spills of every kernel, by generation."""
    about = (
        f"Compiled by Triton {record['triton']} for sm_80, sm_90 and sm_100, not run: registers of "
        "a thread, bytes of shared memory\nof a program on sm_90, bytes spilled. "
        "`scripts/bench_aot.py`"
    )
    rows = ["| kernel | registers 80 / 90 / 100 | shared | spilled |", "|" + " --- |" * 4]
    for name, made in record["builds"].items():
        each = [made[f"sm_{arch}"] for arch in (80, 90, 100)]
        registers = " / ".join(str(x["registers"]) for x in each)
        spilled = [x["spill_bytes"] for x in each]
        shown = " / ".join(map(str, spilled)) if any(spilled) else "0"
        label, shared = name.replace("|", "/"), each[1]["shared_bytes"]  # a bar ends a cell
        rows.append(f"| {label} | {registers} | {shared} | {shown} |")
    return "\n".join([about, "", *rows])


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode": engine.decode,
    "prefill": engine.prefill,
    "prefill_float32": engine.prefill,
    "store": store.store,
    "remote": store.remote,
    "store_lmcache": store.beside_lmcache,
    "codecs": store.codecs,
    "sparse_decode": engine.sparse_decode,
    "end_to_end": engine.end_to_end,
    "indexes": indexes,
    "needles": needles,
    "needles_long": needles,
    "kvpress": kvpress,
    "memory": engine.memory,
    "blend": blend,
    "blend_quality": blend_quality,
    "aot": aot,
    "packed": engine.packed,
    "serve_mixed": serve.mixed,
    "serve_long": serve.long,
    "serve_interference": serve.interference,
    "serve_shared": serve.shared,
    "faults": faults,
    "soak": soak,
}
TITLES = {
    "prefill_float32": "Prefill in fp32",
    "remote": "Shared tier over Redis",
    "store_lmcache": "Store beside LMCache",
    "aot": "Kernels, compiled ahead of time",
    "codecs": "Codecs of stored KV",
    "packed": "Packed prompts",
    "serve_mixed": "Server under load",
    "serve_long": "Server with long prompts",
    "serve_interference": "Server: streams while prompts are read",
    "serve_shared": "Server beside transformers serve",
    "faults": "Faults put into stores",
    "soak": "A store at its budget",
}


def page() -> str:
    """The whole file."""
    parts = [HEAD]
    for name, table in PARTS.items():
        if (record := newest(name)) is None:
            continue
        versions = ", ".join(
            f"{k} {record[k]}" for k in ("torch", "transformers", "lmdb") if k in record
        )
        where = f"{record['device']}, {' '.join(record.get('flags', []))}".rstrip(", ")
        source = f"{where}; {versions}; commit {record['commit'][:8]}; {record['date'][:10]}"
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        parts.append(f"## {title}\n\n{table(record)}\n\n{source}\n")
    return "\n".join(parts)


def newest(name: str) -> dict[str, Any] | None:
    """The last line of the last results file of a benchmark; None where it was not run."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"{name}_[0-9]*.json*"))
    return json.loads(files[-1].read_text().splitlines()[-1]) if files else None


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text() != page())
    TARGET.write_text(page())
