#!/usr/bin/env python3
"""Tokens/s of sparse decode in a whole model, against dense decode: ours, and transformers' best.

    python scripts/bench_end_to_end.py [--json] [--save] [--tokens N] [--rounds N]

The model and the KV are those of bench_decode.py (random, 80 M parameters, bf16, cache filled
synthetically), and so are the contenders of transformers. Ours attend where the KV lies, or, with a
buffer on the device as a GPU needs one, with and without prefetch of the next layer. All decode in
turn in one process; medians over rounds, and medians of the rounds' ratios. A random model has no
evidence to find: what is measured here is time; what is found stands in bench_needles.py.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench_common import add_outputs, facts, finish, random_qwen3, ratio, synchronize
from bench_decode import (
    OURS,
    SHAPE,
    TINY,
    Contender,
    contender,
    random_kv,
    timed,
)
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.decode import decode
from engine.method import Method, preset
from engine.model.hf import HFModel
from engine.sparse.cache import SparseCache, pool_shape
from kvstore.pool.pinned import PinnedTier

THEIRS = ("static sdpa", "dynamic sdpa")
METHODS = {
    "headrace, sparse": preset("headrace"),
    "headrace, sparse, no tail": preset("headrace", tail=False),
    "headrace, sparse, on device": preset("headrace", attend_on="device"),
    "headrace, sparse, on device, prefetch": preset(
        "headrace", attend_on="device", prefetch="layer"
    ),
}
CONSOLE = Console(stderr=True, soft_wrap=True)


def sparse(
    name: str, method: Method, module: PreTrainedModel, length: int, room: int
) -> tuple[Contender, SparseCache]:
    """A contender with a filled sparse cache."""
    model = HFModel(module)
    shape = pool_shape(model, method)
    blocks = -(-(length + room) // shape.block_tokens)
    cache = SparseCache(model, 1, method, PinnedTier(shape, blocks * shape.block_bytes))
    with torch.inference_mode():
        for layer, (k, v) in enumerate(random_kv(module, length)):
            cache.fill(layer, k, v)
    cache.adopt(length)
    return Contender(name, lambda: None, lambda token: decode(model, [cache], token)[0]), cache


def measure(module: PreTrainedModel, length: int, rounds: int, per_round: int) -> dict[str, Any]:
    room = (rounds + 1) * per_round
    runners = [contender(name, module, length, room) for name in (OURS, *THEIRS)]
    caches = {}
    for name, method in METHODS.items():
        runner, caches[name] = sparse(name, method, module, length, room)
        runners.append(runner)
        CONSOLE.print(f"{name}: filled")
    tokens = torch.randint(3, 200, (room, 1), generator=torch.Generator().manual_seed(1))
    for turn in range(rounds + 1):
        part = tokens[turn * per_round : (turn + 1) * per_round]
        for runner in runners[turn % len(runners) :] + runners[: turn % len(runners)]:
            seconds = timed(runner, part) / per_round
            if turn:  # the first warms up
                runner.seconds.append(seconds)
    synchronize(tokens.device)
    found = report(runners) | {"stats": {name: numbers(cache) for name, cache in caches.items()}}
    for cache in caches.values():
        cache.close()
    return found


def numbers(cache: SparseCache) -> dict[str, float]:
    stats = cache.stats
    return {
        "hit_share": stats.hit_share,
        "guessed_share": stats.guessed / stats.selected,
        "fetched_mib_per_step": stats.fetched_bytes / stats.steps / 2**20,
        "waited_ms_per_step": stats.waited_s / stats.steps * 1e3,
        "selected_per_head": stats.selected / stats.steps,
    }


def report(runners: list[Contender]) -> dict[str, Any]:
    medians = {r.name: statistics.median(r.seconds) for r in runners}
    seconds = {r.name: r.seconds for r in runners}
    best = min(THEIRS, key=medians.__getitem__)
    ours = next(iter(METHODS))
    return {
        "best_of_theirs": best,
        "tokens_per_s": {name: 1 / median for name, median in medians.items()},
        "median_ms": {name: median * 1e3 for name, median in medians.items()},
        "speedup_over_theirs": ratio(seconds[best], seconds[ours]),
        "speedup_over_own_dense": ratio(seconds[OURS], seconds[ours]),
    }


def show(record: dict[str, Any]) -> None:
    found = record["result"]
    table = Table("contender", "tokens/s", "ms", "hits", "of a guess", "MiB fetched", "ms waited")
    for name, rate in found["tokens_per_s"].items():
        stats = found["stats"].get(name)
        rest = ["", "", "", ""]
        if stats is not None and "device" in name:
            rest = [f"{stats['hit_share']:.2f}", f"{stats['guessed_share']:.2f}"]
            rest += [f"{stats['fetched_mib_per_step']:.1f}", f"{stats['waited_ms_per_step']:.1f}"]
        label = "headrace, dense" if name == OURS else name
        table.add_row(label, f"{rate:.1f}", f"{found['median_ms'][name]:.1f}", *rest)
    out = Console(width=110, soft_wrap=True)
    out.print(table)
    out.print(
        f"{record['tokens']} tokens: {found['speedup_over_theirs']:.2f}× the best of transformers "
        f"({found['best_of_theirs']}), {found['speedup_over_own_dense']:.2f}× our own dense decode"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_outputs(parser)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to test this script")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    device = torch.device("cpu")
    record = facts(device) | {"benchmark": "end_to_end", "dtype": "bfloat16", "batch": 1}
    module = random_qwen3(TINY if options.tiny else SHAPE, device)
    record |= {"tokens": options.tokens, "rounds": options.rounds, "tail": True}
    record["parameters"] = sum(p.numel() for p in module.parameters())
    record["result"] = measure(module, options.tokens, options.rounds, 2)
    finish("end_to_end", record, options, record["result"], lambda: show(record))


if __name__ == "__main__":
    main()
