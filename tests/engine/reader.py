"""What a new process does with a store that another one filled."""

import math
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from engine import Engine, EngineConfig, breakeven
from kvstore.config import StoreConfig
from tests.engine.families import build, prompt


class Answers(NamedTuple):
    """Tokens per prompt, prompt tokens that came from the store, and hits of the disk tier."""

    tokens: list[list[int]]
    cached: list[int]
    disk_hits: int


def settings(folder: Path) -> EngineConfig:
    """Small blocks, no host tier: whatever is reused comes from LMDB."""
    store = StoreConfig(host_bytes=0, disk_path=str(folder), disk_bytes=1 << 28)
    return EngineConfig(block_tokens=16, prefill_chunk=48, store=store)


def answer(family: str, lengths: list[int], count: int, folder: Path) -> Answers:
    """Greedy answers of a model of `family` to its prompts of `lengths`, over one store.

    What is stored is loaded, however slow a busy machine makes that seem.
    """
    loads = mock.patch.object(breakeven, "LEAST_S", math.inf)
    with loads, Engine(build(family), config=settings(folder)) as engine:
        done = engine.generate([prompt(n).tolist() for n in lengths], max_new_tokens=count)
        hits = engine.stats().tiers["disk"].hits
        return Answers([c.tokens for c in done], [c.stats.cached_tokens for c in done], hits)
