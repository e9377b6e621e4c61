#!/usr/bin/env python3
"""Dense prefill against `transformers`: seconds until the logits after a prompt, one request.

Every contender runs the same model object on the same tokens, all of them in turn in one process;
the speed-up is the median over rounds of the best of theirs ÷ ours.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import add_outputs, facts, finish, quantile, random_qwen3, ratio, timed
from bench_decode import SHAPE, TINY, TOLERANCE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.cache import SequenceCache
from engine.model.hf import HFModel
from engine.prefill import prefill

CHUNK = 512
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LENGTHS = {2048: 9, 8192: 5, 16384: 3}  # and rounds
OURS, WHOLE, CHUNKED = "headrace", "sdpa, whole", "sdpa, chunks"
CONSOLE = Console(stderr=True, soft_wrap=True)
Reader = Callable[[Tensor], Tensor]  # a prompt's tokens -> the logits after the last of them


def readers(module: PreTrainedModel) -> dict[str, Reader]:
    """Every way to read a prompt into a new cache."""
    model = HFModel(module)

    def ours(tokens: Tensor) -> Tensor:
        return prefill(model, SequenceCache(model.shape, len(tokens)), tokens, chunk=CHUNK)

    @torch.inference_mode()
    def theirs(tokens: Tensor, chunk: int) -> Tensor:
        cache, logits = DynamicCache(config=module.config), torch.empty(0)
        for part in tokens.split(chunk):
            said = module(part[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = said.logits
        return logits[0, -1]

    return {
        OURS: ours,
        WHOLE: lambda tokens: theirs(tokens, len(tokens)),
        CHUNKED: lambda tokens: theirs(tokens, CHUNK),
    }


def measured(ways: dict[str, Reader], length: int, rounds: int, vocab: int) -> dict[str, Any]:
    """Alternating rounds of all contenders at one length."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, vocab, (length,), generator=generator)
    logits = {name: read(tokens).double() for name, read in ways.items()}  # warms up, too
    names, seconds = list(ways), {name: list[float]() for name in ways}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(timed(lambda read=ways[name]: read(tokens)))
        said = ", ".join(f"{name} {x[-1]:.2f} s" for name, x in seconds.items())
        CONSOLE.print(f"{length} tokens, round {i + 1}/{rounds}: {said}")
    best = min((WHOLE, CHUNKED), key=lambda name: statistics.median(seconds[name]))
    distance = float((logits[OURS] - logits[WHOLE]).norm() / logits[WHOLE].norm())
    return {
        "best": best,
        "speedup": ratio(seconds[best], seconds[OURS]),
        "logit_distance": distance,
        "contenders": {
            name: {"median_s": statistics.median(x), "p90_s": quantile(x, 0.9), "rounds": len(x)}
            for name, x in seconds.items()
        },
    }


def show(record: dict[str, Any]) -> None:
    table = Table("tokens", "contender", "s, median", "s, p90", "tokens/s")
    for length, at in record["lengths"].items():
        for name, x in at["contenders"].items():
            mark = " *" if name == at["best"] else ""
            speed = f"{int(length) / x['median_s']:.0f}"
            times = f"{x['median_s']:.2f}", f"{x['p90_s']:.2f}"
            table.add_row(str(length), name + mark, *times, speed)
        table.add_section()
    Console(width=110, soft_wrap=True).print(table)
    for length, at in record["lengths"].items():
        print(f"{length}: {at['speedup']:.2f} times as fast as the best of theirs (*)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_outputs(parser)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to test this script")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, help="of every length; default: fewer of long ones")
    options = parser.parse_args()
    device, shape = torch.device("cpu"), TINY if options.tiny else SHAPE
    record = facts(device) | {"benchmark": "prefill", "dtype": options.dtype, "model": shape}
    module = random_qwen3(shape, device, DTYPES[options.dtype])
    ways = readers(module)
    record |= {"parameters": sum(p.numel() for p in module.parameters()), "chunk": CHUNK}
    record["lengths"] = {
        length: measured(ways, length, options.rounds or LENGTHS[length], shape["vocab_size"])
        for length in options.lengths
    }
    said = {f"speedup_{n // 1024}k": round(x["speedup"], 2) for n, x in record["lengths"].items()}
    name = "prefill" if options.dtype == "bfloat16" else f"prefill_{options.dtype}"
    finish(name, record, options, said, lambda: show(record))
    return 0 if all(x["logit_distance"] < TOLERANCE for x in record["lengths"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
