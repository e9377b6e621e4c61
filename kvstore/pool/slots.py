"""Which blocks of running requests are in memory, and which only on disk."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from kvstore.errors import PoolFull
from kvstore.pool.spill import Spill

Numbers = Int[np.ndarray, " _"]


@dataclass(slots=True)
class SpillStats:
    """Blocks of one layer, unless a name says bytes."""

    hits: int = 0  # wanted and in memory
    promotions: int = 0  # wanted and read from disk
    evictions: int = 0  # made to leave memory
    spilled_bytes: int = 0  # written; evicted blocks that the disk has as they are, are not
    read_bytes: int = 0

    def __add__(self, other: "SpillStats") -> "SpillStats":
        return SpillStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Slots:
    """Which blocks of one layer are in memory. Callers hold `lock` while they use an answer.

        nowhere -> in a slot, newer than the disk <-> in a slot, as on disk <-> on disk alone

    Args:
        slab: a slot for each of its blocks.
        setting: budget of the slots, for errors.
    """

    def __init__(
        self, layer: int, slab: UInt8[Tensor, "slots Hk P row"], num_blocks: int, spill: Spill,
        setting: str,
    ) -> None:  # fmt: skip
        self.lock = threading.RLock()
        self.stats = SpillStats()
        self._memory = slab.view(len(slab), -1).numpy()
        self._first, self._spill, self._setting = layer * num_blocks, spill, setting
        self._slot = np.zeros(num_blocks, np.int64)  # of a resident block
        self._resident = np.zeros(num_blocks, bool)
        self._stored = np.zeros(num_blocks, bool)  # the disk has it as it is
        self._block = np.zeros(len(slab), np.int64)  # in an occupied slot
        self._occupied = np.zeros(len(slab), bool)
        self._used = np.zeros(len(slab), np.int64)  # when; 0 if empty
        self._pins = np.zeros(len(slab), np.int64)
        self._now = 0

    def passes(
        self, blocks: Numbers, *, writing: bool = False
    ) -> Iterator[tuple[Numbers, Numbers]]:
        """Bring blocks into memory, as many at a time as there is room for, resident ones first.

        Yields which of `blocks` are there and in which slots, until the next pass.

        Args:
            writing: they are about to change; those that are nowhere get a slot.
        Raises:
            PoolFull: if all slots are pinned, by others than the blocks.
        """
        absent = ~self._resident[blocks]
        room = int((self._pins == 0).sum()) if absent.any() else max(1, len(blocks))
        if not room:
            raise PoolFull(f"all {len(self._pins)} blocks in memory are held; {self._remedy}")
        order = np.argsort(absent, kind="stable")
        for lo in range(0, len(blocks), room):
            part = order[lo : lo + room]
            yield part, self._bring(blocks[part], writing)

    @contextmanager
    def pinned(self, blocks: Numbers) -> Iterator[Numbers]:
        """The slots of blocks, which stay there meanwhile. Raises PoolFull if they do not fit."""
        with self.lock:
            slots = self._bring(blocks, False)
            self._pins[slots] += 1
        try:
            yield slots
        finally:
            with self.lock:
                self._pins[slots] -= 1

    def forget(self, blocks: Numbers) -> None:
        """The blocks are nowhere now."""
        with self.lock:
            slots = self._slot[blocks[self._resident[blocks]]]
            self._occupied[slots], self._used[slots] = False, 0
            self._resident[blocks] = self._stored[blocks] = False

    def _bring(self, blocks: Numbers, writing: bool) -> Numbers:
        here = self._resident[blocks]
        missing = blocks[~here]
        self.stats.hits += int(here.sum())
        if len(missing):
            self._load(missing, self._vacate(len(missing), keep=self._slot[blocks[here]]))
        if writing:
            self._stored[blocks] = False
        slots = self._slot[blocks]
        self._now += 1
        self._used[slots] = self._now
        return slots

    def _vacate(self, count: int, keep: Numbers) -> Numbers:
        """Empty slots, the least recently used first. Raises PoolFull."""
        free = self._pins == 0
        free[keep] = False
        found = np.flatnonzero(free)
        if len(found) < count:
            raise PoolFull(
                f"{count + len(keep)} blocks of a layer must be in memory at once, and there is "
                f"room for {len(found) + len(keep)}; {self._remedy}"
            )
        slots = found[np.argsort(self._used[found], kind="stable")[:count]]
        self._evict(slots[self._occupied[slots]])
        return slots

    def _evict(self, slots: Numbers) -> None:
        blocks = self._block[slots]
        changed = ~self._stored[blocks]
        written = slots[changed]
        self._spill.write([(self._number(self._block[s]), self._memory[s]) for s in written])
        self._stored[blocks], self._resident[blocks] = True, False
        self._occupied[slots], self._used[slots] = False, 0
        self.stats.evictions += len(slots)
        self.stats.spilled_bytes += len(written) * self._memory.shape[1]

    def _load(self, blocks: Numbers, slots: Numbers) -> None:
        """Put blocks into empty slots, with what the disk has of them."""
        stored = self._stored[blocks]
        pairs = zip(blocks[stored], slots[stored], strict=True)
        self._spill.read([(self._number(b), self._memory[s]) for b, s in pairs])
        self._slot[blocks], self._resident[blocks] = slots, True
        self._block[slots], self._occupied[slots] = blocks, True
        self.stats.promotions += int(stored.sum())
        self.stats.read_bytes += int(stored.sum()) * self._memory.shape[1]

    def _number(self, block: np.int64) -> int:
        return self._first + int(block)

    @property
    def _remedy(self) -> str:
        return f"raise {self._setting}"
