"""Seconds to the first token of ten reused chunks in a new order, beside full prefills."""

import statistics
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from engine import BlendConfig, Engine, EngineConfig, Segments
from engine.blend.repair import PolicyName
from engine.model.hf import HFModel
from gpu_bench.prefill import DENSE, Prefill
from gpu_bench.timing import free_memory, synchronized
from kvstore.config import StoreConfig

POLICIES: tuple[PolicyName, ...] = ("union", "deviation", "reposition")
SHARE = 0.15
ENDS = 64  # tokens of the instructions, and of the question
HEADLINE = "union"


class Blend:
    """An engine that has the KV of chunks in host memory."""

    def __init__(self, module: PreTrainedModel, chunks: int, tokens: int) -> None:
        self.module, self.random = module, torch.Generator().manual_seed(0)
        size = HFModel(module).shape.kv_bytes_per_token * (chunks * tokens + 4 * ENDS)
        store = StoreConfig(host_bytes=2 * size)
        chunk = 4096 if module.device.type == "cuda" else 64
        config = EngineConfig(store=store, prefill_chunk=chunk, cache_bytes=4 * size)
        self.engine = Engine(module, config=config)
        self.prefix = self.draw(ENDS)
        self.chunks = [self.draw(tokens) for _ in range(chunks)]
        self.engine.precompute(self.chunks, self.prefix)

    def draw(self, count: int) -> list[int]:
        vocab = self.module.config.vocab_size
        return torch.randint(3, vocab, (count,), generator=self.random).tolist()

    def prompt(self) -> Segments:
        order = torch.randperm(len(self.chunks), generator=self.random).tolist()
        return Segments(self.prefix, [self.chunks[i] for i in order], self.draw(ENDS))

    def blended(self, policy: PolicyName) -> tuple[float, float | None]:
        """Seconds to the first token, and the share of reused tokens that was charged."""
        settings = BlendConfig(policy=policy, share=SHARE, controller=False)
        done = self.engine.generate([self.prompt()], max_new_tokens=1, blend=settings)[0]
        assert done.stats.blend is not None
        return done.stats.ttft_s, done.stats.blend.charged

    def full(self, name: str) -> tuple[float, None]:
        """Seconds of a prefill of all tokens, on the module that the engine uses."""
        prompt = torch.tensor(self.prompt().tokens, device=self.module.device)
        way = Prefill(self.module, len(prompt)).way(name)
        began = synchronized(self.module.device)
        way(prompt)
        return synchronized(self.module.device) - began, None


def lines(
    module: PreTrainedModel, chunks: int, tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """One line for each policy and each full prefill, and comparisons of those so far."""
    bench = Blend(module, chunks, tokens)
    facts = {"part": "blend", "chunks": chunks, "chunk_tokens": tokens, "share": SHARE}
    facts |= {"layers": module.config.num_hidden_layers, "kv": "in host memory"}
    runs: dict[str, Callable[[], tuple[float, float | None]]] = {
        **{name: partial(bench.full, name) for name in DENSE},
        **{name: partial(bench.blended, name) for name in POLICIES},
    }
    medians: dict[str, float] = {}
    for name, run in runs.items():
        line = facts | {"name": name}
        try:
            found = [run() for _ in range(rounds + 1)][1:]
            medians[name] = statistics.median(seconds for seconds, _ in found)
            if module.device.type == "cuda":
                line |= {"median_s": medians[name], "seconds": [seconds for seconds, _ in found]}
            line |= {} if found[-1][1] is None else {"charged": found[-1][1]}
        except Exception as error:
            traceback.print_exc()
            line |= {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}
        yield line
        if name in POLICIES and name in medians and module.device.type == "cuda":
            yield facts | {"name": "compared"} | compared(medians)
    bench.engine.close()
    free_memory()


def compared(medians: dict[str, float]) -> dict[str, Any]:
    """How many times as fast as the faster full prefill."""
    able = [name for name in DENSE if name in medians]
    if not able:
        return {"error": "no full prefill was measured"}
    best = min(able, key=medians.__getitem__)
    faster = {name: medians[best] / medians[name] for name in POLICIES if name in medians}
    return {"fastest_full": best, "faster": faster, "headline": HEADLINE}
