"""Prompts of chunks, and what a blend makes of them before the first token is chosen."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import BlendConfig, BlendReport, Engine, EngineConfig, Segments
from engine.cache import SequenceCache
from engine.prefill import prefill
from engine.sampling import Sampling
from kvstore.block import LayerKV
from kvstore.config import StoreConfig
from tests.engine.families import prompt

POLICIES = ("reposition", "boundary", "deviation", "query", "union")
CONFIG = EngineConfig(block_tokens=16, prefill_chunk=48, store=StoreConfig(host_bytes=1 << 27))


class Blended(NamedTuple):
    """Logits after the prompt, every layer's rotated KV, and the report."""

    logits: Tensor
    layers: list[LayerKV]
    report: BlendReport


def segments(count: int = 4, *, separator: list[int] | None = None) -> Segments:
    """Chunks of odd sizes, none a multiple of a block."""
    chunks = [prompt(37 + 11 * i, seed=i).tolist() for i in range(count)]
    return Segments(
        prompt(9, seed=50).tolist(), chunks, prompt(13, seed=51).tolist(), separator or ()
    )


def blended(engine: Engine, asked: Segments, **settings: Any) -> Blended:
    """Prefill `asked`; the controller loads always."""
    config = BlendConfig(**({"controller": False} | settings))
    run = engine.accept(asked, 1, Sampling(), (), config)
    try:
        logits = engine.blending.prefill(run)
        assert isinstance(run.cache, SequenceCache)
        layers = [run.cache.view(i, run.cache.length) for i in range(engine.model.shape.num_layers)]
        report = run.stats.blend
        assert report is not None
        assert report.exact_tokens + report.reused_tokens + report.fresh_tokens == len(asked.tokens)
        return Blended(logits, layers, report)
    finally:
        run.release()


def full(engine: Engine, asked: Segments) -> Blended:
    """The same by an exact prefill, without a store."""
    cache = SequenceCache(engine.model.shape, len(asked.tokens))
    logits = prefill(engine.model, cache, torch.tensor(asked.tokens))
    layers = [cache.view(i, cache.length) for i in range(engine.model.shape.num_layers)]
    return Blended(logits, layers, BlendReport())
