"""Whether the stored start of a prompt is loaded, or computed because that is faster."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.perfmodel import PerfModel, Work
from kvstore.block import BlockKey
from kvstore.sources import Shared
from kvstore.store import TieredStore

LEAST_S = 0.1  # of loading: what is there sooner, is loaded


@dataclass(slots=True)
class Choices:
    """Prompts whose start was stored, by what was done with it."""

    loaded: int = 0
    computed: int = 0


class BreakEven:
    """Decides by measured speeds of the tiers and of prefill; loads while these are not known.

    Thread-safe. One for all tenants of an engine.

    Args:
        token_bytes: of KV of a token.
        steps: parts in which KV is loaded while others are computed.
    """

    def __init__(self, store: TieredStore, token_bytes: int, steps: int) -> None:
        self._store, self._token_bytes = store, token_bytes
        self._speeds = PerfModel(steps)
        self._lock = threading.Lock()
        self._choices = Choices()

    def worth(self, stored: Sequence[BlockKey], tokens: int, shared: Shared = None) -> bool:
        """Whether to load what is stored of the start of a prompt of so many tokens.

        Args:
            shared: as in `TieredStore.lookup`.
        """
        if not stored:
            return False
        reusable = sum(key.num_tokens for key in stored)
        work = Work(reusable, tokens - reusable, self._loads(stored, shared), 0.0)
        load = self._speeds.decide_start(work, LEAST_S).load
        with self._lock:
            self._choices.loaded += load
            self._choices.computed += not load
        return load

    def computed(self, tokens: int, seconds: float, start: int) -> None:
        """Learn what a prefill of `tokens` behind `start` others took."""
        self._speeds.prefilled(tokens, seconds, start=start)

    def loaded(self, stored: Sequence[BlockKey], seconds: float, shared: Shared = None) -> None:
        """Learn what it took to load blocks, unless they came from several tiers."""
        if len(loads := self._loads(stored, shared)) == 1:
            ((tier, nbytes),) = loads.items()
            self._speeds.loaded(tier, nbytes, seconds)

    def choices(self) -> Choices:
        """How often it was either."""
        with self._lock:
            return Choices(self._choices.loaded, self._choices.computed)

    def _loads(self, stored: Sequence[BlockKey], shared: Shared) -> Counter[str]:
        """Bytes by the tier they rest in."""
        loads: Counter[str] = Counter()
        for key, tier in zip(stored, self._store.resting(stored, shared), strict=True):
            if tier is not None:
                loads[tier] += key.num_tokens * self._token_bytes
        return loads
