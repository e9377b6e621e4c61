#!/usr/bin/env python3
"""Time to the first token of ten reused chunks in a new order, beside full prefills.

A random Llama in bf16 on the CPU; every policy computes the share asked for, or the least that it
can. Two columns: chunks in host memory, and on a disk whose pages were dropped. Contenders
alternate, on the same prompts; medians; loading is part of every time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_common import add_outputs, facts, finish
from store_bench.pages import drop, resident_share
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine import BlendConfig, BlendReport, Engine, EngineConfig, Segments
from engine.blend.repair import PolicyName
from engine.cache import SequenceCache
from engine.prefill import prefill
from kvstore.config import StoreConfig
from kvstore.disk.environment import files_of

POLICIES: tuple[PolicyName, ...] = ("reposition", "boundary", "deviation", "union")
SHARE = 0.15
PREFIX, QUESTION, VOCAB = 32, 32, 32000
FULL = ("headrace", "transformers")
BANDWIDTHS = (0.3, 2.0, 20.0)  # times the one at which loading takes as long as a full prefill
FIXED = (SHARE, 0.5)  # shares of union that the controller is compared with, beside computing all
WARM = 3  # requests from which it learns


def model(tiny: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = (2, 64, 128, 2, 1) if tiny else (12, 768, 2048, 12, 4)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    names += ("num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        **dict(zip(names, sizes, strict=True)), vocab_size=VOCAB, max_position_embeddings=8192
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


class Bench:
    """One model, two stores with the same chunks, one prompt a round."""

    def __init__(self, folder: Path, module: PreTrainedModel, chunks: int, tokens: int) -> None:
        self.folder, self.module = folder, module
        self.random = torch.Generator().manual_seed(0)
        self.prefix = self.draw(PREFIX)
        self.chunks = [self.draw(tokens) for _ in range(chunks)]
        self.seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.reports: dict[str, BlendReport] = {}
        self.resident = 0.0  # the largest share of pages that a drop left
        self.host = Engine(module, config=EngineConfig(store=StoreConfig(host_bytes=4 << 30)))
        self.host.precompute(self.chunks, self.prefix)
        self.other = Engine(module)  # has prefixes alone
        with self.disk() as engine:
            engine.precompute(self.chunks, self.prefix)

    def draw(self, count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=self.random).tolist()

    def disk(self) -> Engine:
        store = StoreConfig(host_bytes=0, disk_path=str(self.folder / "store"))
        return Engine(self.module, config=EngineConfig(store=store))

    def prompt(self) -> Segments:
        order = torch.randperm(len(self.chunks), generator=self.random).tolist()
        chunks = [self.chunks[i] for i in order]
        return Segments(self.prefix, chunks, self.draw(QUESTION))

    def round(self) -> None:
        asked = self.prompt()
        for name, run in (("headrace", self.ours), ("transformers", self.theirs)):
            self.note("full", name, run(asked))
        self.note("host", "prefix caching", self.prefix_cached(asked))
        for policy in POLICIES:
            self.note("host", policy, self.blended(self.host, asked, policy))
            with self.disk() as engine:  # a map that is open keeps pages
                files = files_of(self.folder / "store")
                drop(files)
                self.resident = max(self.resident, resident_share(files))
                self.note("cold", policy, self.blended(engine, asked, policy))

    def prefix_cached(self, asked: Segments) -> float:
        """All that is stored is another prompt with the same instructions."""
        self.other.store.clear()
        self.other.generate(
            [*self.prefix, *self.draw(self.host.config.block_tokens)], max_new_tokens=1
        )
        return self.other.generate(list(asked.tokens), max_new_tokens=1)[0].stats.ttft_s

    def note(self, column: str, row: str, seconds: float) -> None:
        self.seconds[column][row].append(seconds)

    def ours(self, asked: Segments) -> float:
        began = time.perf_counter()
        cache = SequenceCache(self.host.model.shape, len(asked.tokens))
        prefill(self.host.model, cache, torch.tensor(asked.tokens))
        return time.perf_counter() - began

    @torch.inference_mode()
    def theirs(self, asked: Segments) -> float:
        began = time.perf_counter()
        self.module(torch.tensor(asked.tokens)[None], use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    def blended(
        self, engine: Engine, asked: Segments, policy: PolicyName, share: float = SHARE
    ) -> float:
        settings = BlendConfig(policy=policy, share=share, controller=False)
        stats = engine.generate([asked], max_new_tokens=1, blend=settings)[0].stats
        assert stats.blend is not None
        if share == SHARE:
            self.reports[policy] = stats.blend
        return stats.ttft_s

    # the controller

    def controlled(self, times: float, rounds: int) -> dict[str, float]:
        """Seconds by choice where loading is `times` as fast as what a full prefill takes."""
        with Engine(self.module, config=self.host.config) as engine:
            engine.precompute(self.chunks, self.prefix)
            nbytes = len(self.chunks) * len(self.chunks[0]) * engine.model.shape.kv_bytes_per_token
            found: dict[str, list[float]] = defaultdict(list)
            with slowed(engine, times * nbytes / self.full()[1]):
                for turn in range(WARM + rounds):
                    asked = self.prompt()
                    seconds = self.choices(engine, asked) if turn >= WARM else {}
                    stats = engine.generate([asked], max_new_tokens=1, blend=CONTROLLED)[0].stats
                    engine.store.delete(engine.plain.keys(asked.tokens))  # where it computed all
                    for name, value in (seconds | {"controller": stats.ttft_s}).items():
                        if turn >= WARM:
                            found[name].append(value)
                    assert stats.blend is not None
                    print(f"{times:g}: {stats.ttft_s:.2f} s, {stats.blend.reason}", file=sys.stderr)
        return {name: statistics.median(values) for name, values in found.items()}

    def choices(self, engine: Engine, asked: Segments) -> dict[str, float]:
        computed = engine.generate([list(asked.tokens)], max_new_tokens=1)[0].stats.ttft_s
        engine.store.delete(engine.plain.keys(asked.tokens))
        shares = {f"{s:g}": self.blended(engine, asked, "union", s) for s in FIXED}
        return {"compute": computed} | shares

    def full(self) -> tuple[str, float]:
        """The faster full prefill, and its seconds."""
        seconds = {name: statistics.median(self.seconds["full"][name]) for name in FULL}
        best = min(seconds, key=lambda name: seconds[name])
        return best, seconds[best]

    def summary(self) -> dict[str, Any]:
        baseline, seconds = self.full()
        faster = {
            column: {
                row: seconds / statistics.median(self.seconds[column][row]) for row in POLICIES
            }
            for column in ("host", "cold")
        }
        charged = {name: self.reports[name].charged for name in POLICIES}
        return faster | {"charged": charged, "baseline_s": seconds, "baseline": baseline}

    def close(self) -> None:
        self.host.close()
        self.other.close()


CONTROLLED = BlendConfig(policy="union", share=SHARE)


@contextmanager
def slowed(engine: Engine, bytes_per_s: float) -> Iterator[None]:
    """Reads take as long as at this bandwidth."""
    read_many = engine.store.read_many

    def slow(keys: Any, layers: range, out: torch.Tensor) -> list[bool]:
        began = time.perf_counter()
        found = read_many(keys, layers, out)
        time.sleep(max(0.0, out.nbytes / bytes_per_s - time.perf_counter() + began))
        return found

    with mock.patch.object(engine.store, "read_many", slow):
        yield


def table(bench: Bench, controlled: dict[str, dict[str, float]]) -> str:
    baseline, best = bench.full()
    lines = [f"{'seconds, median':<24}{'':>8}{'x':>8}{'charged':>9}   (x: faster than {baseline})"]
    for column, rows in bench.seconds.items():
        for row, values in rows.items():
            charged = f"{bench.reports[row].charged:9.1%}" if row in bench.reports else ""
            middle = statistics.median(values)
            lines.append(f"{column + ', ' + row:<24}{middle:8.3f}{best / middle:8.2f}{charged}")
    for times, rows in controlled.items():
        fixed = {name: value for name, value in rows.items() if name != "controller"}
        ratio = rows["controller"] / min(fixed.values())
        choices = ", ".join(f"{name} {value:.2f}" for name, value in rows.items())
        lines.append(f"bandwidth {times}: {choices}; {ratio:.2f} of the best fixed")
    return "\n".join(lines)


def record(bench: Bench, controlled: dict[str, dict[str, float]]) -> dict[str, Any]:
    return bench.summary() | facts(torch.device("cpu")) | {
        "bench": "blend", "unit": "s", "seconds": bench.seconds, "controller": controlled,
        "chunks": len(bench.chunks), "chunk_tokens": len(bench.chunks[0]),
        "prefix": PREFIX, "question": QUESTION, "share": SHARE,
        "model": bench.module.config.to_dict(), "threads": torch.get_num_threads(),
        "resident_before_cold": bench.resident,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512, help="of a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that it runs")
    parser.add_argument("--no-controller", action="store_true", help="policies alone")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    add_outputs(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(Path(folder), model(arguments.tiny), arguments.chunks, arguments.tokens)
        bench.round()
        bench.seconds.clear()  # the first round warms up
        for turn in range(arguments.rounds):
            print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr)
            bench.round()
        bandwidths = () if arguments.no_controller else BANDWIDTHS
        rounds = min(3, arguments.rounds)
        controlled = {f"{times:g}": bench.controlled(times, rounds) for times in bandwidths}
        bench.close()
    found = record(bench, controlled)
    finish("blend", found, arguments, bench.summary(), lambda: print(table(bench, controlled)))


if __name__ == "__main__":
    main()
