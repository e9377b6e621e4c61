#!/usr/bin/env python3
"""One layer's sparse attention against dense attention: time, by part, and what it finds.

    python scripts/bench_sparse_decode.py [--json] [--save] [--quick]

32 query heads on 8 KV heads of 128 dimensions in bf16, a budget of 2,048 tokens, evidence scattered
over the context (`evals.fixtures`). Ours is a `SparseLayer` of the default method, as the engine
uses it: score and select, find the rows, attend where they lie and to an estimate of the rest; and
without the estimate. Against it stand the dense
formulations that torch has (grouped matrix products, and SDPA with folded query groups; the faster
one of the two is the baseline), and the project's own compiled dense kernel. Beside the selection
stands FAISS's fast scan of 4-bit product codes of the same size (PQ64x4), which returns the best
2,048 of every query head, without softmax and group. All take the same keys, values and queries and
run in turn; medians over rounds, and medians of the rounds' ratios. Recall is the share of
attention that the selected tokens hold, over that of the best 2,048, mean over query heads.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import add_outputs, facts, finish, ratio
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.attention import attend_token, attend_token_torch
from engine.cache import Query
from engine.method import Method, preset
from engine.model.pieces import AttentionSpec, Shape
from engine.model.rope import Rope
from engine.sparse.layer import SparseLayer
from evals.fixtures import Size, make_fixture
from kvstore.pool.device import DeviceTier
from kvstore.rows import PoolShape, Raw, RowLayout

HQ, HK, DIM, BUDGET = 32, 8, 128, 2048
LENGTHS = (8192, 32768, 131072)
SPEC = AttentionSpec(scale=DIM**-0.5)
METHOD = preset("headrace", budget=BUDGET)
NO_TAIL = preset("headrace", budget=BUDGET, tail=False)
DENSE = "headrace, dense kernel"
TORCH = ("grouped matmul", "SDPA, folded groups")
CONSOLE = Console(stderr=True, soft_wrap=True)


def make_data(length: int, seed: int = 0) -> tuple[Tensor, Tensor, list[Query]]:
    """Keys, values and queries of the scattered fixture: evidence lies alone, in chunks of 8."""
    size = Size(tokens=length, head_dim=DIM, kv_heads=HK, group=HQ // HK, queries=4)
    trace = make_fixture("scattered", seed, size)
    queries = trace.rotated.queries.bfloat16()
    return trace.rotated.keys, trace.values, [Query(q, q) for q in queries]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention as two batched matrix products."""
    scores = torch.matmul(q.view(HK, -1, DIM), k.mT) * SPEC.scale
    return torch.matmul(scores.float().softmax(-1).to(v.dtype), v).view(HQ, DIM)


class Faiss:
    """One fast-scan index a KV head, as large as our codes."""

    def __init__(self, k: Tensor) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self.indexes = []
        for head in (k.float() - k.float().mean(1, keepdim=True)).numpy():
            made = faiss.IndexPQFastScan(DIM, DIM // 2, 4, faiss.METRIC_INNER_PRODUCT)
            made.train(head[: 1 << 14])
            made.add(head)
            self.indexes.append(made)

    def search(self, query: Query) -> list[Any]:
        heads = query.rotated.view(HK, -1, DIM).float().numpy()
        return [index.search(q, BUDGET) for index, q in zip(self.indexes, heads, strict=True)]


class Ours:
    """A filled layer, and the times of its parts."""

    def __init__(self, k: Tensor, v: Tensor, method: Method = METHOD) -> None:
        length = k.shape[1]
        shape = Shape(1, HQ, HK, DIM, 100, length + 1, torch.bfloat16, torch.device("cpu"))
        layout = RowLayout(Raw(torch.bfloat16), Raw(torch.bfloat16), DIM, torch.bfloat16)
        pools = PoolShape(1, HK, layout)
        blocks = -(-length // pools.block_tokens)
        pool = DeviceTier(pools, blocks * pools.block_bytes)
        rope = Rope(torch.ones(DIM // 2, dtype=torch.float64))  # keys come rotated
        self.layer = SparseLayer(shape, SPEC, rope, method, pool.lease(), pool, 0)
        start = time.perf_counter()
        self.layer.fill(k, v)
        self.fill_s = time.perf_counter() - start

    def attend(self, query: Query) -> Tensor:
        return self.layer.attend(query)

    def parts(self, query: Query) -> dict[str, float]:
        """Seconds of selecting alone, and of attending to what was selected."""
        start = time.perf_counter()
        tokens = self.layer.select(query)
        middle = time.perf_counter()
        self.layer.attend_chosen(query.rotated, tokens)
        return {
            "score and select": middle - start,
            "gather and attend": time.perf_counter() - middle,
        }


def recall(layer: SparseLayer, k: Tensor, queries: list[Query]) -> dict[str, float]:
    """Attention that the selected tokens hold, by itself and over the most so many can hold."""
    held, most = [], []
    for query in queries:
        tokens = layer.select(query)
        scores = torch.matmul(query.rotated.view(HK, -1, DIM).float(), k.float().mT) * SPEC.scale
        weights = scores.softmax(-1)  # [Hk G T]
        own = tokens[:, None].expand(-1, weights.shape[1], -1)
        held.append(weights.gather(-1, own).sum(-1))
        most.append(weights.topk(BUDGET, -1).values.sum(-1))
    share = torch.stack(held) / torch.stack(most)
    return {"mass": float(torch.stack(held).mean()), "of_oracle": float(share.mean())}


@torch.inference_mode()
def measure(length: int, rounds: int) -> dict[str, Any]:
    """Alternating rounds of all contenders at one context length."""
    k, v, queries = make_data(length)
    ours = Ours(k, v)
    runners: dict[str, Callable[[Query], Any]] = {
        "headrace": ours.attend,
        "headrace, no tail": Ours(k, v, NO_TAIL).attend,
        TORCH[0]: lambda q: grouped(q.rotated, k, v),
        TORCH[1]: lambda q: attend_token_torch(q.rotated, k, v, SPEC),
        DENSE: lambda q: attend_token(q.rotated, k, v, SPEC),
        "headrace, select alone": ours.layer.select,
        "FAISS fast scan, search alone": Faiss(k).search,
    }
    times: dict[str, list[float]] = {name: [] for name in runners}
    parts: dict[str, list[float]] = {}
    for turn in range(rounds + 2):  # two to warm up
        query = queries[turn % len(queries)]
        for name, run in runners.items():
            start = time.perf_counter()
            run(query)
            times[name].append(time.perf_counter() - start)
        for name, seconds in ours.parts(query).items():
            parts.setdefault(name, []).append(seconds)
    CONSOLE.print(f"{length} tokens: {rounds} rounds done")
    return report(times, parts) | recall(ours.layer, k, queries) | {"fill_s": ours.fill_s}


def report(times: dict[str, list[float]], parts: dict[str, list[float]]) -> dict[str, Any]:
    kept = {name: values[2:] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in kept.items()}
    best = min(TORCH, key=medians.__getitem__)
    return {
        "best_dense": best,
        "speedup": ratio(kept[best], kept["headrace"]),
        "speedup_over_own_dense": ratio(kept[DENSE], kept["headrace"]),
        "ms": {name: seconds * 1e3 for name, seconds in medians.items()},
        "p90_ms": {name: sorted(x)[int(0.9 * (len(x) - 1))] * 1e3 for name, x in kept.items()},
        "parts_ms": {name: statistics.median(x[2:]) * 1e3 for name, x in parts.items()},
    }


def summary(record: dict[str, Any]) -> dict[str, float]:
    return {f"speedup_{n // 1024}k": round(x["speedup"], 2) for n, x in record["lengths"].items()}


def show(record: dict[str, Any]) -> None:
    """The table of one run, on stdout."""
    table = Table("context", "contender", "ms, median", "ms, p90", "× headrace")
    for length, at in record["lengths"].items():
        for name, ms in at["ms"].items():
            mark = " *" if name == at["best_dense"] else ""
            times = f"{ms:.2f}", f"{at['p90_ms'][name]:.2f}", f"{ms / at['ms']['headrace']:.1f}"
            table.add_row(str(length), name + mark, *times)
        table.add_section()
    out = Console(width=110, soft_wrap=True)
    out.print(table)
    for length, at in record["lengths"].items():
        parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in at["parts_ms"].items())
        out.print(
            f"{length}: {at['speedup']:.1f}× the fastest dense of torch (*), "
            f"{at['speedup_over_own_dense']:.1f}× our own; {parts}; the selected hold "
            f"{at['mass']:.3f} of the attention, {at['of_oracle']:.3f} of the most possible"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_outputs(parser)
    parser.add_argument("--quick", action="store_true", help="5 rounds, 8k and 32k only")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--lengths", type=int, nargs="+")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 21)
    lengths = options.lengths or (LENGTHS[:2] if options.quick else LENGTHS)
    record = facts(torch.device("cpu")) | {"benchmark": "sparse_decode", "dtype": "bfloat16"}
    record |= {
        "heads": [HQ, HK],
        "head_dim": DIM,
        "budget": BUDGET,
        "method": "headrace",
        "tail": True,
    }
    record |= {"rounds": rounds, "lengths": {n: measure(n, rounds) for n in lengths}}
    record["summary"] = summary(record)
    finish("sparse_decode", record, options, record["summary"], lambda: show(record))


if __name__ == "__main__":
    main()
