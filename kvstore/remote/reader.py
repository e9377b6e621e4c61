"""Blocks from a backend, many in one exchange, verified before anybody sees them."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from kvstore.block import BlockKey
from kvstore.errors import CorruptRecord
from kvstore.remote.guarded import Guarded
from kvstore.remote.index import MAX_INDEX_BYTES, Index, unpack
from kvstore.remote.parts import Part, strides
from kvstore.remote.seal import Seals

READ_BYTES = 8 << 20  # in one exchange
READ_THREADS = 4  # while one waits for its bytes, others verify theirs
INDEXES = READ_BYTES // MAX_INDEX_BYTES


class Reader:
    """Reads in some threads, through a buffer of 8 MiB for each, which stays."""

    def __init__(self, guarded: Guarded, seals: Seals) -> None:
        self._guarded, self._seals = guarded, seals
        self._threads = ThreadPoolExecutor(
            READ_THREADS, thread_name_prefix="headrace-remote-reader"
        )
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    def indexes(self, keys: Sequence[BlockKey]) -> list[Index | None]:
        """What the backend has of the blocks; None for one that it has not, or not soundly."""
        found: list[Index | None] = []
        for first in range(0, len(keys), INDEXES):
            found += self._indexes(keys[first : first + INDEXES])
        return found

    def load(self, parts: Sequence[Part]) -> set[bytes]:
        """Fill the rows of parts; digests of the blocks of which all were delivered."""
        lacking = set[bytes]().union(*self._threads.map(self._load, strides(parts, READ_BYTES)))
        return {part.key.digest for part in parts} - lacking

    def close(self) -> None:
        self._threads.shutdown()

    def _indexes(self, keys: Sequence[BlockKey]) -> list[Index | None]:
        names = [self._seals.index_name(key.digest) for key in keys]
        with self._buffers([MAX_INDEX_BYTES] * len(keys)) as buffers:
            sizes = self._guarded.ask(lambda backend: backend.get_many(names, buffers))
            if sizes is None:
                return [None] * len(keys)
            values = zip(keys, buffers, sizes, strict=True)
            return [self._unpacked(key, buffer[:size]) for key, buffer, size in values]

    def _unpacked(self, key: BlockKey, value: memoryview) -> Index | None:
        if not value:
            return None
        try:
            return unpack(value, key, self._seals)
        except CorruptRecord as error:
            self._guarded.distrust(key.digest, str(error), damaged=True)
            return None

    def _load(self, parts: Sequence[Part]) -> set[bytes]:
        """Digests of the blocks of which a part was not delivered."""
        names = [self._seals.record_name(part.key.digest, part.number) for part in parts]
        with self._buffers([part.nbytes for part in parts]) as buffers:
            sizes = self._guarded.ask(lambda backend: backend.get_many(names, buffers))
            if sizes is None:
                return {part.key.digest for part in parts}
            values = zip(parts, buffers, sizes, strict=True)
            return {p.key.digest for p, buffer, n in values if not self._deliver(p, buffer[:n])}

    def _deliver(self, part: Part, value: memoryview) -> bool:
        try:
            part.deliver(value, self._seals)
            self._guarded.verified()
            return True
        except CorruptRecord as error:
            self._guarded.distrust(part.key.digest, str(error), damaged=bool(value))
            return False

    @contextmanager
    def _buffers(self, sizes: Sequence[int]) -> Iterator[list[memoryview]]:
        """A buffer of each size, side by side, for the time being."""
        need = sum(sizes)
        with self._lock:
            whole = self._free.pop() if self._free and need <= READ_BYTES else None
        whole = whole or memoryview(np.empty(max(need, READ_BYTES), np.uint8).data)
        ends = np.cumsum(sizes, dtype=int).tolist()
        try:
            yield [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        finally:
            if len(whole) == READ_BYTES:
                with self._lock:
                    self._free.append(whole)
