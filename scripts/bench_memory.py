#!/usr/bin/env python3
"""What a long context costs in memory: bytes on the device, in the host's pool, on disk, and RSS.

    python scripts/bench_memory.py [--tokens N] [--json] [--save]

A random model of two layers with 8 KV heads of 128 dimensions, its cache filled synthetically,
decodes a few tokens; each method in a process of its own. Device bytes are those of the live
tensors that stand in for the KV: index, hot buffer, low-rank factors, tables. Peak RSS is
compared with what was granted: the process before, the pool, the device bytes, and one layer's
keys and values, and its keys once more, while a prompt is taken in.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_common import add_outputs, facts, finish, peak_bytes, reset_peak
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.decode import decode
from engine.method import Method, preset
from engine.model.hf import HFModel
from engine.model.pieces import Shape
from engine.sparse.cache import SparseCache, pool_shape
from kvstore.pool.pinned import PinnedTier
from kvstore.pool.spill import Spill

TOKENS = 131_072
STEPS = 4
SHAPE = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=1024,
    max_position_embeddings=TOKENS + 1024,
    tie_word_embeddings=True,
)
# name -> method, share of the KV that the pool may hold in memory, target for device ÷ KV
CASES: dict[str, tuple[Method, float | None, float]] = {
    "headrace": (preset("headrace", attend_on="device"), None, 1 / 8),
    "headrace, no tail": (preset("headrace", attend_on="device", tail=False), None, 1 / 8),
    "shadowkv": (preset("shadowkv"), None, 1 / 5),
    "lowrank + scalar + int4": (
        preset("headrace", keys="lowrank", values="int4", attend_on="device"),
        None,
        1 / 4,
    ),
    "headrace, a quarter in memory": (preset("headrace", attend_on="device"), 0.25, 1 / 8),
}


def layers(shape: Shape, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rotated keys and values of one layer after the other."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_kv_heads, tokens, shape.head_dim)
    for _ in range(shape.num_layers):
        k, v = (torch.empty(size, dtype=shape.dtype) for _ in range(2))
        for part in (*k, *v):
            part.normal_(generator=generator)
        yield k, v


def measure(case: str, tokens: int) -> dict[str, Any]:
    """One method, in this process."""
    method, share, _ = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SHAPE)
    model = HFModel(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())
    shape = pool_shape(model, method)
    pool_kv = -(-(tokens + STEPS) // shape.block_tokens) * shape.block_bytes
    pool_bytes = pool_kv if share is None else int(share * pool_kv)
    layer_bytes = tokens * model.shape.kv_bytes_per_token // model.shape.num_layers
    torch.ones(8, 8) @ torch.ones(8, 8)  # what a first product loads is not ours
    before = reset_peak(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        spill = None if share is None else Spill(Path(folder), 2 * pool_kv)
        pool = PinnedTier(shape, pool_bytes, spill=spill)
        cache = SparseCache(model, 1, method, pool)
        for i, (k, v) in enumerate(layers(model.shape, tokens)):
            cache.fill(i, k, v)
            del k, v
        cache.adopt(tokens)
        for token in torch.randint(3, 1000, (STEPS, 1)):
            decode(model, [cache], token)
        peak, device = peak_bytes(torch.device("cpu")), cache.device_bytes
        numbers = cache.stats, pool.stats()
        cache.close()
        pool.close()
    granted = before + pool_bytes + device + layer_bytes * 3 // 2
    return {
        "kv_bytes": tokens * model.shape.kv_bytes_per_token,
        "device_bytes": device,
        "device_share": device / (tokens * model.shape.kv_bytes_per_token),
        "pool_bytes": pool_bytes,
        "disk_reads_bytes": numbers[1].read_bytes,
        "rss_before_bytes": before,
        "peak_rss_bytes": peak,
        "granted_bytes": granted,
        "peak_over_granted": peak / granted,
        "host_key_rows": numbers[0].host_key_rows,
        "hit_share": numbers[0].hit_share,
    }


def alone(case: str, tokens: int) -> dict[str, Any]:
    """The same, in a process of its own."""
    run = [sys.executable, __file__, "--alone", case, "--tokens", str(tokens)]
    out = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def show(record: dict[str, Any]) -> None:
    table = Table("method", "device MiB", "of the KV", "target", "pool MiB", "peak RSS ÷ granted")
    for case, at in record["cases"].items():
        mib = [f"{at[name] / 2**20:.0f}" for name in ("device_bytes", "pool_bytes")]
        share, target = f"1/{1 / at['device_share']:.1f}", f"1/{1 / CASES[case][2]:.0f}"
        table.add_row(case, mib[0], share, target, mib[1], f"{at['peak_over_granted']:.2f}")
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    add_outputs(parser)
    parser.add_argument("--alone", choices=CASES, help="internal: one case in this process")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.alone, options.tokens)))
        return 0
    record = facts(torch.device("cpu")) | {"benchmark": "memory", "tail": True}
    record["tokens"] = options.tokens
    record |= {"model": SHAPE, "cases": {case: alone(case, options.tokens) for case in CASES}}
    finish("memory", record, options, record["cases"], lambda: show(record))
    within = all(
        at["device_share"] <= CASES[case][2] and at["peak_over_granted"] <= 1.15
        for case, at in record["cases"].items()
    )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
