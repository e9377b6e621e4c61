"""What goes from one tier of a store to another."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kvstore.allowance import Allowance
from kvstore.ancestors import with_ancestors
from kvstore.block import BlockKey, KVBlock
from kvstore.disk.writer import Writer
from kvstore.level import Level
from kvstore.passage import Passage, staying
from kvstore.pins import Pins
from kvstore.spares import Spares
from kvstore.tier import HostTier, Item


class Moves:
    """Blocks on their way down, by a thread of its own; what stays of other machines' (a `Keeper`);
    and what is brought up because it was of use.

    Whoever carries blocks leaves those that are being deleted (see `Passage`).
    """

    def __init__(
        self,
        levels: Sequence[Level],
        pins: Pins,
        passage: Passage,
        queue_bytes: int,
        pace: Allowance | None,
    ) -> None:
        self._first = levels[0]
        self.fast = [level for level in levels if not level.tier.durable]
        self.slow = [level for level in levels if level.tier.durable]
        self._pins, self._passage = pins, passage
        self.spares = Spares()
        self.writer = Writer(self._write, queue_bytes, pace) if self.slow else None

    def room(self, tenant: bytes) -> int:
        """Bytes of blocks of other machines that may stay in memory."""
        return self.fast[0].room(self._pins.digests(), tenant) if self.fast else 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.spares.empty(shape, dtype)

    def find(self, digest: bytes) -> KVBlock | None:
        item = self._find(digest)
        return None if item is None else item[1]

    def keep(self, blocks: Sequence[Item]) -> None:
        """In memory, and on disk as far as the writer has room; by who carries them."""
        for level in self.fast:
            level.insert(blocks)
        if self.writer is not None:
            self.writer.offer(blocks)

    def carrying(self) -> AbstractContextManager[frozenset[bytes]]:
        return self._passage.carrying()

    def bring(self, keys: Sequence[BlockKey], get: Callable[[BlockKey], KVBlock | None]) -> int:
        """Copy leading keys into the fastest tier as far as it has room; how many it then has."""
        self._offer(keys)
        for count, key in enumerate(keys):
            if self._first.held([key])[0]:
                continue
            with self.carrying() as going:
                block = get(key)  # which may have brought it
                if block is not None:
                    self._first.insert(staying([(key, block)], going))
            if not self._first.held([key])[0]:
                return count
        return len(keys)

    def _offer(self, keys: Sequence[BlockKey]) -> None:
        """Those that are in memory, to slower tiers that take in what is seen twice."""
        if self.writer is None or not any(level.choosy for level in self.slow):
            return
        held = zip(*[level.tier.held(keys) for level in self.slow], strict=True)
        lacking = [key for key, found in zip(keys, held, strict=True) if not all(found)]
        with self.carrying() as going:
            here = [item for key in lacking if (item := self._find(key.digest)) is not None]
            self.writer.put(staying(here, going))

    def _write(self, batch: Sequence[Item]) -> None:
        with self.carrying() as going:
            for level in self.slow:
                found = with_ancestors(batch, level.tier, self._find)
                blocks = staying(found, going)
                level.skip(len(found) - len(blocks))
                own = {key.digest for key, _ in batch}
                below = {key.digest for key, _ in blocks if key.digest not in own}
                level.insert(blocks, below)

    def _find(self, digest: bytes) -> Item | None:
        hosts = [level.tier for level in self.fast if isinstance(level.tier, HostTier)]
        return next((item for host in hosts if (item := host.find(digest))), None)
