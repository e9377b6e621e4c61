"""The tiers of a store as its readers see them."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from kvstore.block import BlockKey, KVBlock
from kvstore.layout import gaps
from kvstore.level import Level
from kvstore.remote.tier import RemoteTier
from native.threads import be_patient

# what a server said before of blocks that are not in this machine, by their digests
Shared: TypeAlias = Mapping[bytes, bool] | None

READ_THREADS = 4  # on two cores, too: a disk wants several reads at a time
LOOKUP_STRIDE = 256  # keys looked up at a time, so that an early miss is cheap


class Sources:
    """Where blocks are read from: fastest first, what other machines share last.

    Args:
        lock: of the numbers; never held during I/O.
    """

    def __init__(
        self, levels: Sequence[Level], remote: RemoteTier | None, lock: threading.RLock
    ) -> None:
        self._levels, self._remote, self._lock = levels, remote, lock
        self._all: list[Level | RemoteTier] = [*levels] if remote is None else [*levels, remote]
        self._readers = ThreadPoolExecutor(READ_THREADS, "headrace-reader", be_patient)

    def lookup(self, keys: Sequence[BlockKey], shared: Shared = None) -> int:
        """How many leading keys are somewhere. Counts as a use of them; moves no data.

        Args:
            shared: of blocks elsewhere, as `shared` told; the server is asked for others now.
        """
        leading = 0
        for start in range(0, len(keys), LOOKUP_STRIDE):
            part = keys[start : start + LOOKUP_STRIDE]
            found = self._lookup(part, shared)
            leading += found
            if found < len(part):
                break
        return leading

    def shared(self, keys: Sequence[BlockKey]) -> dict[bytes, bool]:
        """Of the leading keys that are not in this machine, by digest, whether the server has them.

        Counts as no use of any block.
        """
        known: dict[bytes, bool] = {}
        for start in range(0, len(keys) if self._remote is not None else 0, LOOKUP_STRIDE):
            part = keys[start : start + LOOKUP_STRIDE]
            *here, there = self._held(part)
            places = [any(column) for column in zip(*here, strict=True)]
            of_part = zip(part, places, there, strict=True)
            asked = {key.digest: is_there for key, is_here, is_there in of_part if not is_here}
            known |= asked
            if not all(asked.values()):
                break
        return known

    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None:
        """KV of a run of layers of a block, from the fastest tier that has it."""
        for level in self._all:
            data = level.tier.read(key, layers, out)
            if data is not None:
                self._count(level, 1, data.nbytes)
                return data
        return None

    def get(self, key: BlockKey) -> KVBlock | None:
        """A whole block, likewise."""
        for level in self._all:
            block = level.tier.get(key)
            if block is not None:
                self._count(level, 1, block.nbytes)
                return block
        return None

    def read_many(
        self, keys: Sequence[BlockKey], layers: range, out: Float[Tensor, "B n 2 Hk P D"]
    ) -> list[bool]:
        """Which keys are there; KV of a run of layers of these is then in rows of `out`."""
        share = max(1, -(-len(keys) // READ_THREADS))
        parts = [slice(first, first + share) for first in range(0, len(keys), share)]
        runs = [self._readers.submit(self._run, keys[p], layers, out[p]) for p in parts]
        found = [is_there for run in runs for is_there in run.result()]
        if self._remote is not None and not all(found):
            self._remotely(self._remote, keys, layers, out, found)
        return found

    def resting(self, keys: Sequence[BlockKey], shared: Shared = None) -> list[str | None]:
        """The fastest tier that has each of the keys; counts as no use of it."""
        names: list[str | None] = [None] * len(keys)
        for level, held in reversed([*zip(self._all, self._held(keys, shared), strict=True)]):
            names = [level.tier.name if is_ else n for is_, n in zip(held, names, strict=True)]
        return names

    def close(self) -> None:
        """Return when no read is under way."""
        self._readers.shutdown()

    def _lookup(self, keys: Sequence[BlockKey], shared: Shared) -> int:
        held, leading = self._held(keys, shared), 0
        while leading < len(keys) and any(found[leading] for found in held):
            leading += 1
        with self._lock:
            for level, found in zip(self._levels, held, strict=False):
                level.looked_up(keys, found[: leading + 1])
            if self._remote is not None:
                self._remote.stats.hits += sum(held[-1][:leading])
                self._remote.stats.misses += leading < len(keys)
        return leading

    def _held(self, keys: Sequence[BlockKey], shared: Shared = None) -> list[list[bool]]:
        """Which keys each tier has; the last one is asked, or believed, for those of no other."""
        held = [level.held(keys) for level in self._levels]
        if self._remote is not None:
            here = [any(column) for column in zip(*held, strict=True)]
            held.append(self._remote.held(keys, here, shared))
        return held

    def _run(self, keys: Sequence[BlockKey], layers: range, out: Tensor) -> list[bool]:
        """As `read_many`, in this thread: from each tier what those before it do not have."""
        found = [False] * len(keys)
        for level in self._levels:
            for gap in gaps(found):
                found[gap] = level.tier.read_many(keys[gap], layers, out[gap])
                count = sum(found[gap])
                self._count(level, count, count * out[0].nbytes)
        return found

    def _remotely(
        self,
        remote: RemoteTier,
        keys: Sequence[BlockKey],
        layers: range,
        out: Float[Tensor, "B n 2 Hk P D"],
        found: list[bool],
    ) -> None:
        """Read what is not `found` yet, all at once, and note which of it is now."""
        left = [i for i, is_there in enumerate(found) if not is_there]
        there = remote.read_many([keys[i] for i in left], layers, [out[i] for i in left])
        for i, is_there in zip(left, there, strict=True):
            found[i] = is_there
        self._count(remote, sum(there), sum(there) * out[0].nbytes)

    def _count(self, level: Level | RemoteTier, count: int, nbytes: int) -> None:
        with self._lock:
            level.stats.reads += count
            level.stats.bytes_read += nbytes
