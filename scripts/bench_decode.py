#!/usr/bin/env python3
"""Dense decode against the best of `transformers`: tokens/s and peak memory, one request.

Every contender runs the same model object and starts from the same random KV, and all of them
decode in turn in one process; the speed-up is the median over rounds of ours ÷ the best of
theirs (the contender with the best median). Peak memory is measured alone, in a fresh process
per contender: weights, cache and everything a step allocates, after the cache was filled.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    add_outputs,
    facts,
    finish,
    peak_bytes,
    quantile,
    random_qwen3,
    reset_peak,
    synchronize,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.cache import SequenceCache
from engine.decode import decode
from engine.model.hf import HFModel

# Four layers of Qwen3-0.6B: 16 query heads, 8 KV heads, head_dim 128. The vocabulary is cut with
# the depth, so that the output projection keeps its share of the weights (a fifth).
SHAPE = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=16384,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
)
TINY = SHAPE | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=256)
TOKENS_A_ROUND = {2048: 4, 8192: 2, 32768: 1}  # short rounds: more ratios for the median
OURS = "headrace"
THEIRS = {
    f"{kind} {attention}": (kind, attention)
    for kind in ("dynamic", "static")
    for attention in ("eager", "sdpa")
}
DROP_FACTOR = 5  # a contender this much slower than the best of theirs is dropped ...
DROP_AFTER = 2  # ... after this many rounds
KEY_SCALE = 2.0  # scores of variance 4: some tokens matter, so that a wrong key shows
TOLERANCE = 0.05  # relative L2 distance of logits to sdpa's in bf16; eager rounds scores: 0.03-0.06
CONSOLE = Console(stderr=True, soft_wrap=True)


@dataclass(slots=True)
class Contender:
    """One way to decode from a filled cache."""

    name: str
    prepare: Callable[[], None]  # before a round, not timed
    step: Callable[[Tensor], Tensor]  # token [1] -> logits [vocab]
    seconds: list[float] = field(default_factory=list)  # per token, one a round


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    shape = TINY if options.tiny else SHAPE
    if options.alone:
        peaks = peak_alone(options.alone, random_qwen3(shape, device), options.lengths)
        print(json.dumps(peaks))
        return 0
    CONSOLE.print(f"building a random model on {device}")
    record = facts(device) | {"benchmark": "decode", "dtype": "bfloat16", "batch": 1}
    record |= {"model": shape, "rounds": options.rounds, "lengths": {}}
    module = random_qwen3(shape, device)
    record["parameters"] = sum(p.numel() for p in module.parameters())
    for length in options.lengths:
        record["lengths"][length] = speed(module, length, options.rounds)
    del module
    gc.collect()
    add_memory(record, options)
    record["summary"] = summary(record)
    finish("decode", record, options, record["summary"], lambda: show(record))
    return 0 if all(x["logits_agree"] for x in record["lengths"].values()) else 1


def random_kv(module: PreTrainedModel, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rotated keys and values of every layer, [Hk, T, D]; the same for every contender."""
    shape = HFModel(module).shape
    generator = torch.Generator(shape.device).manual_seed(length)
    size = (shape.num_kv_heads, length, shape.head_dim)
    kind: dict[str, Any] = dict(generator=generator, dtype=shape.dtype, device=shape.device)
    for _ in range(shape.num_layers):
        yield torch.randn(size, **kind).mul_(KEY_SCALE), torch.randn(size, **kind)


def contender(name: str, module: PreTrainedModel, length: int, room: int) -> Contender:
    """`name` with a cache of `length` tokens and room for `room` more."""
    if name == OURS:
        return _ours(module, length, room)
    return _theirs(name, module, length, room)


def _ours(module: PreTrainedModel, length: int, room: int) -> Contender:
    model = HFModel(module)
    cache = SequenceCache(model.shape, length + room)
    for layer, (k, v) in enumerate(random_kv(module, length)):
        cache.write(layer, 0, k, v)
    cache.advance(length)
    return Contender(OURS, lambda: None, lambda token: decode(model, [cache], token)[0])


def _theirs(name: str, module: Any, length: int, room: int) -> Contender:
    kind, attention = THEIRS[name]
    cache: Cache = DynamicCache(config=module.config)
    if kind == "static":
        cache = StaticCache(config=module.config, max_cache_len=length + room)
    for layer, (k, v) in enumerate(random_kv(module, length)):
        cache.update(k[None], v[None], layer)

    @torch.inference_mode()
    def step(token: Tensor) -> Tensor:
        logits: Tensor = module(token[None], past_key_values=cache, use_cache=True).logits
        return logits[0, -1]

    return Contender(name, lambda: module.set_attn_implementation(attention), step)


def speed(module: PreTrainedModel, length: int, rounds: int) -> dict[str, Any]:
    """Alternating rounds of all contenders at one context length."""
    per_round = TOKENS_A_ROUND[length]
    room = 2 + per_round * rounds
    runners = [contender(name, module, length, room) for name in (OURS, *THEIRS)]
    tokens = torch.randint(3, 200, (room, 1), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(next(module.parameters()).device)
    errors = warm_up(runners, tokens[:2])
    running = list(runners)
    for i in range(rounds):
        turn = tokens[2 + i * per_round : 2 + (i + 1) * per_round]
        for runner in running[i % len(running) :] + running[: i % len(running)]:
            runner.seconds.append(timed(runner, turn) / per_round)
        if i + 1 == DROP_AFTER:
            running = without_the_slow(running)
        CONSOLE.print(f"{length} tokens, round {i + 1}/{rounds}: " + progress(running))
    return report(runners, rounds, per_round, errors)


def warm_up(runners: list[Contender], tokens: Tensor) -> dict[str, float]:
    """Two tokens each; returns each of theirs' relative distance of the first logits to ours."""
    first = {}
    for runner in runners:
        runner.prepare()
        first[runner.name] = runner.step(tokens[0]).double()
        runner.step(tokens[1])
    ours = first.pop(OURS)
    return {name: float((x - ours).norm() / x.norm()) for name, x in first.items()}


def timed(runner: Contender, tokens: Tensor) -> float:
    """Seconds to decode `tokens`, one after the other."""
    runner.prepare()
    synchronize(tokens.device)
    start = time.perf_counter()
    for token in tokens:
        runner.step(token)
    synchronize(tokens.device)
    return time.perf_counter() - start


def without_the_slow(running: list[Contender]) -> list[Contender]:
    best = min(statistics.median(r.seconds) for r in running if r.name != OURS)
    slow = [r for r in running if statistics.median(r.seconds) > DROP_FACTOR * best]
    for runner in slow:
        CONSOLE.print(f"dropped {runner.name}: more than {DROP_FACTOR} times the best of theirs")
    return [r for r in running if r not in slow]


def progress(running: list[Contender]) -> str:
    return ", ".join(f"{r.name} {r.seconds[-1] * 1e3:.1f} ms" for r in running)


def report(
    runners: list[Contender], rounds: int, per_round: int, errors: dict[str, float]
) -> dict[str, Any]:
    """Median and p90 per contender, and the ratios of ours to the best of theirs."""
    ours, *theirs = runners
    best = min(
        (r for r in theirs if len(r.seconds) == rounds), key=lambda r: statistics.median(r.seconds)
    )
    ratios = [b / a for a, b in zip(ours.seconds, best.seconds, strict=True)]
    return {
        "best": best.name,
        "speedup": statistics.median(ratios),
        "speedup_p10": quantile(ratios, 0.1),
        "speedup_p90": quantile(ratios, 0.9),
        "tokens_a_round": per_round,
        "logit_distance": errors,
        "logits_agree": max(errors[name] for name in errors if "sdpa" in name) < TOLERANCE,
        "contenders": {r.name: timing(r) for r in runners},
    }


def timing(runner: Contender) -> dict[str, Any]:
    median = statistics.median(runner.seconds)
    return {
        "tokens_per_s": 1 / median,
        "median_ms": median * 1e3,
        "p90_ms": quantile(runner.seconds, 0.9) * 1e3,
        "rounds": len(runner.seconds),
    }


def peak_alone(name: str, module: PreTrainedModel, lengths: list[int]) -> dict[int, int]:
    """Peak bytes while `name` decodes two tokens, for every length; runs in its own process."""
    peaks = {}
    device = next(module.parameters()).device
    for length in lengths:
        runner = contender(name, module, length, 4)
        runner.prepare()
        reset_peak(device)
        for token in torch.tensor([[5], [6]], device=device):
            runner.step(token)
        peaks[length] = peak_bytes(device)
        del runner
        gc.collect()
    return peaks


def add_memory(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Peak bytes of every contender at every length, from one process each."""
    for name in (OURS, *THEIRS):
        CONSOLE.print(f"peak memory of {name}, alone")
        run = [sys.executable, __file__, "--alone", name, "--device", options.device]
        run += ["--tiny"] if options.tiny else []
        run += ["--lengths", *map(str, options.lengths)]
        out = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
        for length, peak in json.loads(out.splitlines()[-1]).items():
            record["lengths"][int(length)]["contenders"][name]["peak_bytes"] = peak
    for at in record["lengths"].values():
        peaks = {name: x["peak_bytes"] for name, x in at["contenders"].items()}
        at["memory_best"] = min(THEIRS, key=peaks.__getitem__)
        at["memory_ratio"] = peaks[OURS] / peaks[at["memory_best"]]


def summary(record: dict[str, Any]) -> dict[str, float]:
    at = record["lengths"]
    ratios = {f"speedup_{n // 1024}k": round(at[n]["speedup"], 3) for n in at}
    last = max(at)
    return ratios | {f"memory_ratio_{last // 1024}k": round(at[last]["memory_ratio"], 4)}


def show(record: dict[str, Any]) -> None:
    """The table of one run, on stdout."""
    out = Console(width=110, soft_wrap=True)
    out.print(
        f"{record['device']}, {record['threads']} threads, {' '.join(record['flags'])}; "
        f"torch {record['torch']}, transformers {record['transformers']}; "
        f"{record['parameters'] / 1e6:.0f} M parameters, bf16, commit {record['commit']}"
    )
    table = Table("context", "contender", "tokens/s", "ms, median", "ms, p90", "rounds", "peak MiB")
    for length, at in record["lengths"].items():
        for name, x in at["contenders"].items():
            numbers = f"{x['tokens_per_s']:.2f}", f"{x['median_ms']:.1f}", f"{x['p90_ms']:.1f}"
            mark = " *" if name == at["best"] else ""
            peak = f"{x['peak_bytes'] / 2**20:.0f}"
            table.add_row(str(length), name + mark, *numbers, str(x["rounds"]), peak)
        table.add_section()
    out.print(table)
    for length, at in record["lengths"].items():
        out.print(
            f"{length}: {at['speedup']:.2f}× (p10 {at['speedup_p10']:.2f}, p90 "
            f"{at['speedup_p90']:.2f}) the best of theirs (*, {at['best']}); peak memory "
            f"{at['memory_ratio']:.3f} of theirs' least ({at['memory_best']}); logits within "
            f"{max(at['logit_distance'].values()):.4f} (relative L2; sdpa's must be < {TOLERANCE})"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_outputs(parser)
    parser.add_argument("--quick", action="store_true", help="3 rounds, 2k and 8k only")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to test this script")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--lengths", type=int, nargs="+", choices=TOKENS_A_ROUND)
    parser.add_argument("--alone", choices=(OURS, *THEIRS), help="internal: peak memory of one")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.lengths = options.lengths or list(TOKENS_A_ROUND)[: 2 if options.quick else 3]
    return options


if __name__ == "__main__":
    sys.exit(main())
