"""The ways from a data file into memory, and which one a record takes."""

import mmap
import os
import struct
import threading
from contextlib import suppress

import numpy as np

from kvstore.disk.values import PAGE_BYTES, Values, pages_of

CACHED, DIRECT, MAPPED = range(3)  # as in fetch.c
REMEMBERED = 1 << 16
_SOURCE = struct.Struct("=qqQQQQQ")


class Ways:
    """What `copy_records` needs to know of a file. Thread-safe.

    What is in the page cache is copied out of the map. What is not is read around the cache the
    first time, at the speed of the disk and without pushing others out; when it is asked for
    again, through the cache, to stay there. Where the system does not tell, or the file system
    knows no O_DIRECT, all is read through the cache.
    """

    def __init__(self, file: Values, mapped_at: int = 0, mapped_bytes: int = 0) -> None:
        """`mapped_at`: the address of a map of the file that is safe to read; 0 for none."""
        self._file, self._mapped_at, self._mapped_bytes = file, mapped_at, mapped_bytes
        self._direct = -1
        if hasattr(os, "O_DIRECT"):  # not on every system
            with suppress(OSError):  # nor on every file system
                self._direct = os.open(f"/proc/self/fd/{file.handle}", os.O_RDONLY | os.O_DIRECT)
        self._once: dict[int, None] = {}  # pages of records read around the cache, oldest first
        self._noting = threading.Lock()  # changes of it
        self._scratch = threading.local()

    def way(self, page: int) -> int:
        """The way that the record in `page` must take, if not a faster one: CACHED or DIRECT."""
        return CACHED if page in self._once else DIRECT

    def took(self, page: int, way: int) -> None:
        """Remember which way a record took."""
        if way != DIRECT:
            return
        with self._noting:
            self._once[page] = None
            if len(self._once) > REMEMBERED:
                del self._once[next(iter(self._once))]

    def source(self, header_bytes: int, largest: int) -> bytes:
        """The C struct, for this thread, and payloads of at most `largest` bytes."""
        file, room = self._file.handle, pages_of(largest) * PAGE_BYTES
        scratch = self._scratch_of(2 * room) if self._direct >= 0 else 0
        return _SOURCE.pack(
            file, self._direct, self._mapped_at, self._mapped_bytes, scratch, room, header_bytes
        )

    def close(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def _scratch_of(self, nbytes: int) -> int:
        """Memory of this thread's own, aligned to pages; touched only if it is used."""
        held = getattr(self._scratch, "held", None)
        if held is None or held.nbytes < nbytes:
            held = self._scratch.held = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        return int(held.__array_interface__["data"][0])
