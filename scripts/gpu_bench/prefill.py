"""Seconds to read a long prompt: dense, and with what a sparse method does meanwhile."""

import statistics
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.cache import SequenceCache
from engine.model.hf import HFModel
from engine.prefill import prefill, prefill_layers
from engine.sparse.cache import SparseCache
from gpu_bench.decode import method_of
from gpu_bench.synthetic import ROOM, pool_of
from gpu_bench.timing import free_memory, synchronized

DENSE = ("transformers", "headrace, dense")
SPARSE = ("headrace", "shadowkv")
CHUNK = 4096  # tokens computed at once by our loops; transformers computes all at once


class Prefill:
    """Ways to read one prompt; each returns the logits after it, and keeps nothing."""

    def __init__(self, module: PreTrainedModel, tokens: int) -> None:
        self.module, self.model = module, HFModel(module)
        self.device, self.tokens = module.device, tokens
        self.chunk = CHUNK if self.device.type == "cuda" else 64

    def way(self, name: str) -> Callable[[Tensor], Tensor]:
        """One of DENSE or SPARSE."""
        if name in SPARSE:
            return self.sparse(name)
        return self.theirs if name == DENSE[0] else self.dense

    @torch.inference_mode()
    def theirs(self, prompt: Tensor) -> Tensor:
        """In one pass, by the attention that it chooses."""
        return self.module(prompt[None], use_cache=True, logits_to_keep=1).logits[0, -1]

    def dense(self, prompt: Tensor) -> Tensor:
        cache = SequenceCache(self.model.shape, len(prompt))
        return prefill(self.model, cache, prompt, chunk=self.chunk)

    def sparse(self, name: str) -> Callable[[Tensor], Tensor]:
        """Keys factored or coded, indexes built, KV moved to host memory, layer by layer."""
        method = method_of(name, self.device)
        pool = pool_of(self.model, method, 1, self.tokens + ROOM)

        def read(prompt: Tensor) -> Tensor:
            cache = SparseCache(self.model, len(prompt), method, pool)
            try:
                logits = prefill_layers(self.model, cache, prompt, chunk=self.chunk)
                cache.finalize()
                return logits
            finally:
                cache.close()

        return read


def lines(module: PreTrainedModel, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One line for each way, and comparisons of those so far; first rounds are not counted."""
    bench = Prefill(module, tokens)
    facts = {"part": "prefill", "tokens": tokens, "layers": module.config.num_hidden_layers}
    facts |= {"chunk": bench.chunk, "slabs": "shared by all layers"}
    medians: dict[str, float] = {}
    for name in (*DENSE, *SPARSE):
        line = facts | {"name": name}
        try:
            run = bench.way(name)
            seconds = [_timed(bench, run) for _ in range(rounds + 1)][1:]
            medians[name] = statistics.median(seconds)
            if bench.device.type == "cuda":
                line |= {"seconds": seconds, "median_s": medians[name]}
                line |= {"peak_bytes": torch.cuda.max_memory_allocated()}
        except Exception as error:
            traceback.print_exc()
            line |= {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}
        free_memory()
        yield line
        if name in SPARSE and name in medians and bench.device.type == "cuda":
            yield facts | {"name": "compared"} | compared(medians)


def _timed(bench: Prefill, run: Callable[[Tensor], Tensor]) -> float:
    vocab = bench.model.shape.vocab
    prompt = torch.randint(3, vocab, (bench.tokens,), device=bench.device)
    began = synchronized(bench.device)
    logits = run(prompt)
    ended = synchronized(bench.device)
    if not logits.isfinite().all():
        raise ArithmeticError("logits are not finite")
    return ended - began


def compared(medians: dict[str, float]) -> dict[str, Any]:
    """Times of sparse methods over the fastest dense one."""
    able = [name for name in DENSE if name in medians]
    if not able:
        return {"error": "no dense prefill was measured"}
    best = min(able, key=medians.__getitem__)
    over = {
        dense: {name: medians[name] / medians[dense] for name in SPARSE if name in medians}
        for dense in able
    }
    return {"fastest_dense": best, "over_dense": over[best], "over_each": over}
