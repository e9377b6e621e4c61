#!/usr/bin/env python3
"""What every index finds of attention at equal bytes per token, beside the best possible choice.

    python scripts/bench_indexes.py [--json] [--save] [--plot PNG] [--quick] [--seeds N]

Every method fetches exactly 2% of the tokens there are when a query comes, 4 sinks, a window of 16
and outliers included, chosen as the engine chooses (the largest probability of a group's query
heads). Mass is the attention on them in shares of the oracle's, the exact best as many; error is
|o - ô| / |o| of attention's output. Inputs:

real   queries and keys of both reference models over 8k tokens of the reference pages of the Python
       language, the last 32 tokens as queries; head_dim 64, keys kept in bf16; all layers
else   the fixtures of `evals.fixtures`: 16,384 tokens, head_dim 128, one KV head of 4 query heads,
       16 queries each, seeds 0 to 15

Chunks, pages and sub-spaces are such that an index has its class's bytes at either head_dim.
Scalar codes have the same bits at both, so that at 64 dimensions they take about half of their
class's bytes; their scale is 2 bytes on top. What a sequence has once (means, codebooks) is not in
bytes per token, but in those measured. vq and pq-aware learn from 128 earlier queries. `-compact`:
the same choice, attended with low-rank keys (half of the joint dimensions) and int4 values; its
bytes are the index's. pq of 32 and 64 bytes trains on fewer keys than the default (`POINTS`):
k-means by FAISS is slow in sub-spaces of few dimensions. With 64 keys a centroid, pq@32 finds 0.955
of the flat fixture of seed 0, with 16 0.949.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_common import add_outputs, facts, finish
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.engine import Engine
from engine.method import Method
from engine.model.pieces import Shape
from engine.sparse.indexes import make_index
from evals.dumps import dump, haystack_tokens
from evals.fixtures import KINDS, Size, make_fixture
from evals.recall import Recall, Rows, Truth, fill, mass, recall, truths
from evals.trace import Trace
from kvstore.rows import row_codec
from retrieval.lowrank import Gram, LowRankKeys

BUDGET = 0.02
CLASSES = (4, 16, 32, 64)  # bytes per token and KV head
MODELS = ("needle-tiny", "needle-smear")
INPUTS = ("real", *KINDS)
DEFAULT = "scalar@32"
TARGET = 0.95
POINTS = {4: 64, 16: 64, 32: 16, 64: 4}  # keys a centroid of 8 bits, by class
CONSOLE = Console(stderr=True, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Member:
    """An index with its settings, in a class of bytes."""

    name: str
    size: int
    index: Any
    options: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    compact: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}@{self.size}"


def members(dim: int) -> Iterator[Member]:
    """All of them, for keys of `dim` numbers in bf16."""
    yield Member("vq", 4, "vq", {"centroids": 1024}, calibrated=True)
    for size in CLASSES:
        yield Member("landmarks", size, "landmarks", {"chunk": 2 * dim // size})
        yield Member("quest", size, "quest", {"page": 4 * dim // size})
        yield Member("pq", size, "pq", {"subspaces": size, "points": POINTS[size]})
    for size in (16, 32):
        yield Member("pq4", size, "pq", {"subspaces": 2 * size, "bits": 4})
    yield Member("pq-aware", 16, "pq", {"subspaces": 16}, calibrated=True)
    for size, bits in ((16, 1), (32, 2), (64, 4)):
        yield Member("scalar", size, "scalar", {"bits": bits})
    yield Member("scalar-compact", 32, "scalar", {"bits": 2}, compact=True)


def measure(trace: Trace, member: Member, truth: list[Truth]) -> dict[str, float]:
    """One index on one trace, means over queries and KV heads."""
    heads, _, dim = trace.values.shape
    group = trace.rotated.queries.shape[1]
    kept = trace.values
    shape = Shape(1, group, heads, dim, 1, kept.shape[1], kept.dtype, kept.device)
    method = Method(index=member.index, options=member.options)
    index = make_index(method, shape, truth[0].policy.budget)
    fill(index, trace, calibrated=member.calibrated)
    found = recall(index, trace, truth, compact(trace) if member.compact else None)
    return columns(found) | {"bytes_per_token": index.spec.bytes_per_token}


def columns(found: Recall) -> dict[str, float]:
    """Means over queries and KV heads, and the least mass of them."""
    averaged = ("mass", "error", "fetched", "union")
    means = {name: float(getattr(found, name).double().mean()) for name in averaged}
    return means | {"least": float(found.mass.min()), "nbytes": found.nbytes}


def compact(trace: Trace) -> Rows:
    """Keys from half as many numbers, and values of 4 bits."""
    heads, _, dim = trace.values.shape
    keys, codec = trace.windowed.keys, row_codec("int4")
    gram = Gram(heads, dim)
    gram.accumulate(keys[:, : trace.prompt])
    factors = LowRankKeys.from_gram(gram, rank=heads * dim // 2, dtype=torch.bfloat16)
    factors.append(keys)
    rebuilt = factors.rows(torch.arange(keys.shape[1]).expand(heads, -1)).to(keys.dtype)
    values = codec.decode(codec.encode(trace.values), dim, keys.dtype)
    return Rows(trace.turned(rebuilt), values)


def evaluate(traces: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """All members on some traces, which count alike."""
    rows: dict[str, list[dict[str, float]]] = {}
    best = []
    for trace in traces:
        truth = truths(trace, BUDGET)
        best += [float(mass(x.probs, x.tokens).mean()) for x in truth]
        for member in members(trace.values.shape[2]):
            rows.setdefault(member.key, []).append(measure(trace, member, truth))
    return {key: mean(found) for key, found in rows.items()} | {
        "oracle": {"mass": statistics.fmean(best)}
    }


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Column by column; `least` is the least."""
    found = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return found | ({"least": min(row["least"] for row in rows)} if "least" in found else {})


@torch.no_grad()
def of_model(name: str, tokens: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    with Engine.from_pretrained(name, device="cpu") as engine:
        text = haystack_tokens(engine, tokens, seed=0)
        layers = range(engine.model.shape.num_layers)
        traces = dump(engine.model, text, layers=layers, dtype=torch.bfloat16)
    return evaluate(traces)


@torch.no_grad()
def of_fixture(kind: Any, seed: int, tokens: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    return evaluate([make_fixture(kind, seed, Size(tokens=tokens))])


def run(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Input by input, in as many processes as there are cores; from the slowest task down."""
    tasks = {(name, "real"): partial(of_model, name, options.real_tokens) for name in MODELS}
    for seed in range(options.seeds):
        for kind in KINDS:
            tasks[(str(seed), kind)] = partial(of_fixture, kind, seed, options.tokens)
    results: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in INPUTS}
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        started = {pool.submit(task): where for where, task in tasks.items()}
        for number, done in enumerate(as_completed(started), 1):
            name, kind = started[done]
            results[kind].append(done.result())
            CONSOLE.print(f"{number}/{len(tasks)} {kind} {name}")
    keys = ["oracle", *(member.key for member in members(128))]
    return {
        kind: {key: mean([one[key] for one in found]) for key in keys}
        for kind, found in results.items()
    }


def summary(inputs: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The mass that every index finds of each input, and which one is the default."""
    rows: dict[str, Any] = {}
    for member in sorted(members(128), key=lambda x: (x.size, x.name)):
        size = inputs["clustered"][member.key]["bytes_per_token"]
        found = {name: round(inputs[name][member.key]["mass"], 4) for name in INPUTS}
        rows[member.key] = {"bytes_per_token": size} | found
    return rows | {"default": DEFAULT}


def show(record: dict[str, Any]) -> None:
    """Mass and error by input, and what each index costs."""
    out, inputs = Console(width=118, soft_wrap=True), record["inputs"]
    keys = [key for key in record["summary"] if key != "default"]
    masses = Table("index", "B/token", *INPUTS, title="attention mass / oracle's")
    best = (f"{inputs[name]['oracle']['mass']:.3f}" for name in INPUTS)
    masses.add_row("oracle's own mass", "", *best, end_section=True)
    errors = Table("index", *INPUTS, title="error of attention's output")
    costs = Table("index", "B/token", "measured", "real", "fetched", "union", "least mass")
    for key in keys:
        row, mark = record["summary"][key], " *" if key == DEFAULT else ""
        size = f"{row['bytes_per_token']:g}"
        masses.add_row(key + mark, size, *(f"{row[name]:.3f}" for name in INPUTS))
        errors.add_row(key + mark, *(f"{inputs[name][key]['error']:.3f}" for name in INPUTS))
        costs.add_row(key + mark, size, *_cost(inputs, key))
    out.print(masses, errors, costs)
    out.print(
        "* the default. Costs are of clustered, but real: B/token at head_dim 64, and least mass: "
        "of any query. union: tokens that the query heads of a group would take apart. "
        f"{record['seeds']} seeds, {record['tokens']} tokens, {record['seconds']:.0f} s, "
        f"{record['device']}, commit {record['commit']}"
    )


def _cost(inputs: dict[str, dict[str, dict[str, float]]], key: str) -> Iterator[str]:
    at = inputs["clustered"][key]
    yield f"{at['nbytes']:.1f}"
    yield f"{inputs['real'][key]['bytes_per_token']:g}"
    yield f"{at['fetched']:.0f}"
    yield f"{at['union']:.0f}"
    yield f"{min(inputs[name][key]['least'] for name in INPUTS):.3f}"


def plot(inputs: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Mass by bytes, a panel for every input."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")  # only who draws needs it
    figure, panels = pyplot.subplots(1, len(INPUTS), figsize=(15, 3.2), sharey=True)
    for panel, name in zip(panels, INPUTS, strict=True):
        lines: dict[str, list[dict[str, float]]] = {}
        for member in members(128):
            if not member.compact:
                lines.setdefault(member.name, []).append(inputs[name][member.key])
        for index, rows in lines.items():
            points = [row["bytes_per_token"] for row in rows], [row["mass"] for row in rows]
            width = 2.5 if index == DEFAULT.split("@")[0] else 1.2
            panel.plot(*points, marker="o", markersize=3, linewidth=width, label=index)
        panel.axhline(TARGET, color="grey", linestyle=":", linewidth=1)
        panel.set(title=name, xscale="log", ylim=(0, 1.03), xlabel="bytes / token / head")
        panel.set_xticks(CLASSES, [str(size) for size in CLASSES])
        panel.minorticks_off()
    panels[0].set_ylabel("attention mass / oracle's")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def main() -> int:
    options = _options()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        CONSOLE.print("drawing needs matplotlib: pip install headrace[evals], or leave out --plot")
        return 1
    start = time.perf_counter()
    record = facts(torch.device("cpu")) | {"benchmark": "indexes", "budget": BUDGET}
    record |= {"seeds": options.seeds, "tokens": options.tokens, "jobs": options.jobs}
    try:
        record["inputs"] = run(options)
    except ImportError as error:
        CONSOLE.print(str(error))
        return 1
    record |= {"summary": summary(record["inputs"]), "seconds": time.perf_counter() - start}
    if options.plot:
        plot(record["inputs"], options.plot)
    finish("indexes", record, options, record["summary"], lambda: show(record))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_outputs(parser)
    parser.add_argument("--quick", action="store_true", help="2 seeds")
    parser.add_argument("--seeds", type=int, help="of every fixture, from 0 on; 16")
    parser.add_argument("--tokens", type=int, default=16384, help="of a fixture")
    parser.add_argument("--real-tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="to be drawn")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    options.seeds = options.seeds or (2 if options.quick else 16)
    return options


if __name__ == "__main__":
    sys.exit(main())
