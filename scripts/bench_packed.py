#!/usr/bin/env python3
"""Prompts packed into steps against the same prompts padded, or one by one: seconds and tokens.

Lengths are those of Azure's conversation trace of 2023, scaled down. `packed` fills steps with
chunks of prompts, as a service does; `separate` reads a prompt after the other; `padded` computes
every prompt as long as the longest, with the same code as `packed`; `transformers` does so in one
forward. All of them take turns on the same prompts in one process. `efficiency` is packed's share
of padded's tokens by its share of padded's time: 1 where packing costs nothing.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_common import add_outputs, facts, finish, quantile, random_qwen3, synchronize
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.cache import SequenceCache
from engine.model.hf import HFModel
from engine.prefill import prefill
from engine.step import Piece, step

# Prompt tokens in the trace, in steps of 5 % of its requests; the last is twice their mean less the
# one before: 1 % of the requests have more than 4142, one has 14050.
AZURE = [2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315]
AZURE += [1876, 2734, 4083, 4479]
BATCHES = (8, 32)
LEAST_EFFICIENCY = 0.8
TOLERANCE = 1e-3  # of logits, packed and separate: the sums are the same, in another order
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
CONSOLE = Console(stderr=True, soft_wrap=True)
Chunk = tuple[int, int, int]  # which prompt, from which token, up to which


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    module = build_model(TINY if options.tiny else SHAPE, device)
    record = facts(device) | {"benchmark": "packed", "dtype": str(module.dtype)}
    record |= {"rounds": options.rounds, "scale": options.scale, "batches": {}}
    record["step_tokens"] = options.step_tokens
    for batch in options.batches:
        record["batches"][batch] = measure(module, batch, options)
    record["summary"] = summary(record)
    finish("packed", record, options, record["summary"], lambda: show(record))
    return 0 if all(at["logits_agree"] for at in record["batches"].values()) else 1


def build_model(shape: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """In fp32 on a CPU, where bf16 is slow on most."""
    return random_qwen3(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def lengths(batch: int, scale: float, seed: int = 0) -> list[int]:
    """Of a batch of prompts, as the trace has them."""
    dice, found = random.Random(seed), []
    for _ in range(batch):
        at, within = divmod(dice.random() * (len(AZURE) - 1), 1)
        low, high = AZURE[int(at)], AZURE[int(at) + 1]
        found.append(max(1, round((low + within * (high - low)) * scale)))
    return found


def filled(counts: Sequence[int], budget: int) -> Iterator[list[Chunk]]:
    """Steps of `budget` tokens, the last one of what is left: prompts in order, cut where full."""
    turn, left = list[Chunk](), budget
    for number, count in enumerate(counts):
        at = 0
        while at < count:
            stop = min(count, at + left)
            turn.append((number, at, stop))
            left -= stop - at
            at = stop
            if not left:
                yield turn
                turn, left = [], budget
    if turn:
        yield turn


def packed(model: HFModel, prompts: Sequence[Tensor], budget: int) -> list[Tensor]:
    """The logits after each prompt."""
    caches = [SequenceCache(model.shape, len(prompt)) for prompt in prompts]
    rows: dict[int, Tensor] = {}
    for turn in filled([len(prompt) for prompt in prompts], budget):
        pieces = [
            Piece(caches[b], prompts[b][lo:hi], prompt=True, logits=hi == len(prompts[b]))
            for b, lo, hi in turn
        ]
        found = step(model, pieces)
        for piece in pieces:
            if piece.error is not None:
                raise piece.error
        rows |= {b: row for (b, _, _), row in zip(turn, found, strict=True) if row is not None}
    return [rows[b] for b in range(len(prompts))]


def separate(model: HFModel, prompts: Sequence[Tensor], chunk: int) -> list[Tensor]:
    return [prefill(model, SequenceCache(model.shape, len(p)), p, chunk=chunk) for p in prompts]


def padded(model: HFModel, prompts: Sequence[Tensor], budget: int) -> list[Tensor]:
    """As `packed`, every prompt as long as the longest."""
    longest = max(len(prompt) for prompt in prompts)
    wide = [torch.nn.functional.pad(prompt, (0, longest - len(prompt))) for prompt in prompts]
    return packed(model, wide, budget)


@torch.inference_mode()
def theirs(module: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """One forward of a batch padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=module.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = module(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
    )
    return list(out.logits[:, -1])


def measure(module: PreTrainedModel, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all contenders on one batch."""
    model, counts = HFModel(module), lengths(batch, options.scale)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 200, (n,), generator=generator).to(module.device) for n in counts]
    contenders: dict[str, Callable[[], list[Tensor]]] = {
        "packed": lambda: packed(model, prompts, options.step_tokens),
        "separate": lambda: separate(model, prompts, options.step_tokens),
        "padded": lambda: padded(model, prompts, options.step_tokens),
        "transformers": lambda: theirs(module, prompts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    first = {name: contenders[name]() for name in ("packed", "separate")}  # warms up, too
    for i in range(options.rounds):
        order = list(contenders)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            seconds[name].append(timed(contenders[name], module.device))
        CONSOLE.print(
            f"{batch} prompts, round {i + 1}/{options.rounds}: "
            + ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in order)
        )
    return report(counts, seconds, first)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds; of one thread on a CPU, those that it computed: others' work does not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def report(
    counts: Sequence[int], seconds: dict[str, list[float]], first: dict[str, list[Tensor]]
) -> dict[str, Any]:
    """Medians, and what packing gains by the round, as the machine's pace changes."""
    real, wide = sum(counts), len(counts) * max(counts)
    rounds = list(zip(*seconds.values(), strict=True))
    at = {name: column for column, name in enumerate(seconds)}
    share = [turn[at["packed"]] / turn[at["padded"]] for turn in rounds]
    difference = max(
        float((a.double() - b.double()).abs().max()) for a, b in zip(*first.values(), strict=True)
    )
    return {
        "tokens": real,
        "padded_tokens": wide,
        "token_share": real / wide,
        "time_share": statistics.median(share),
        "efficiency": real / wide / statistics.median(share),
        "median_s": {name: statistics.median(taken) for name, taken in seconds.items()},
        "p90_s": {name: quantile(taken, 0.9) for name, taken in seconds.items()},
        "over": {
            name: statistics.median(turn[at[name]] / turn[at["packed"]] for turn in rounds)
            for name in seconds
        },
        "logit_difference": difference,
        "logits_agree": difference < TOLERANCE,
    }


def summary(record: dict[str, Any]) -> dict[str, float]:
    found = {}
    for batch, at in record["batches"].items():
        found[f"efficiency_{batch}"] = round(at["efficiency"], 3)
        found[f"speedup_{batch}"] = round(at["over"]["padded"], 3)
        found[f"over_transformers_{batch}"] = round(at["over"]["transformers"], 3)
        found[f"over_separate_{batch}"] = round(at["over"]["separate"], 3)
    return found


def show(record: dict[str, Any]) -> None:
    """The table of one run, on stdout."""
    out = Console(width=110, soft_wrap=True)
    table = Table("prompts", "contender", "tokens computed", "s, median", "s, p90", "packed is")
    for batch, at in record["batches"].items():
        for name, median in at["median_s"].items():
            real = name in ("packed", "separate")
            tokens = at["tokens"] if real else at["padded_tokens"]
            times = f"{at['over'][name]:.2f}×" if name != "packed" else ""
            table.add_row(
                str(batch), name, str(tokens), f"{median:.2f}", f"{at['p90_s'][name]:.2f}", times
            )
        table.add_section()
    out.print(table)
    for batch, at in record["batches"].items():
        out.print(
            f"{batch} prompts: {at['token_share']:.3f} of padded's tokens in "
            f"{at['time_share']:.3f} of its time, efficiency {at['efficiency']:.2f} (must be at "
            f"least {LEAST_EFFICIENCY}); logits within {at['logit_difference']:.1e} of separate's"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_outputs(parser)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to test this script")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--threads", type=int, help="1 on a CPU measures the time it computes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.1, help="of the trace's lengths")
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
