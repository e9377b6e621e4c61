"""Memory of blocks that are gone, for blocks that come."""

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.block import KVBlock
from kvstore.codecs.codec import Payload, byte_view
from native.around import copy_around
from native.pages import own_pages

SPARE_BYTES = 128 << 20
LEAST_PAGES_BYTES = 1 << 20  # below it, so many mappings would cost more than holes


class Spares:
    """Host memory that is used again as soon as nothing refers to it. Thread-safe.

    The first touch of a page is a fault and has it zeroed: on a 2-core VM a copy into fresh memory
    goes at 1.2 GB/s, huge pages or not, and at 16 into memory that was used before. At most
    `limit_bytes` wait for their next use; what is more goes back to the system. Blocks stay long:
    in a heap they would keep holes between what comes and goes, so large ones have their own pages.
    """

    def __init__(self, limit_bytes: int = SPARE_BYTES) -> None:
        self._limit = limit_bytes
        self._returned: deque[Payload] = deque()  # by any thread, at any point of its work
        self._lock = threading.Lock()  # guards everything below
        self._free: dict[int, list[Payload]] = {}  # by size; first what was not asked for longest
        self.nbytes = 0  # of what is free

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of any content. Its memory comes back when its last view is gone."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            self._note_returned()
            memory = self._take(nbytes)
        self._sort()
        if memory is None:
            memory = _fresh(nbytes)
        lease = memory.view()  # this object lives as long as the tensor's storage
        weakref.finalize(lease, self._come_back, memory).atexit = False
        return torch.from_numpy(lease).view(dtype).view(torch.Size(shape))

    def owned(self, block: KVBlock) -> KVBlock:
        """The block, without the rest of a bigger tensor that it may be a view of."""
        if block.data.untyped_storage().nbytes() == block.nbytes:
            return block
        copy = self.empty(block.data.shape, block.data.dtype)
        copy_around(byte_view(copy), byte_view(block.data))
        return KVBlock(copy)

    def close(self) -> None:
        """Keep nothing from now on."""
        with self._lock:
            self._limit = 0
            self._note_returned()

    def _come_back(self, memory: Payload) -> None:
        self._returned.append(memory)
        self._sort()

    def _sort(self) -> None:
        """Note what was returned. A thread that finds another, or itself, at it leaves it that."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._note_returned()
            finally:
                self._lock.release()

    def _take(self, nbytes: int) -> Payload | None:
        same = self._free.pop(nbytes, None)
        if same is None:
            return None
        memory = same.pop()
        self.nbytes -= nbytes
        if same:
            self._free[nbytes] = same  # now the last asked for
        return memory

    def _note_returned(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._free.setdefault(memory.nbytes, []).append(memory)
            self.nbytes += memory.nbytes
        while self.nbytes > self._limit:
            size = next(iter(self._free))
            self._free[size].pop()
            self.nbytes -= size
            if not self._free[size]:
                del self._free[size]


def _fresh(nbytes: int) -> Payload:
    if nbytes < LEAST_PAGES_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8).numpy()
    return own_pages((nbytes,), torch.uint8).numpy()
