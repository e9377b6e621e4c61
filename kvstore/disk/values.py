"""The file that holds all KV, beside LMDB, which holds only what is known of it.

A block is a run of pages, of which each record begins its own:

    page * PAGE_BYTES   the next page
    [ header | zeros   ][ payload           ][ ... ][ ... zeros ]

so that a disk can write the payload to where it belongs in memory. A writer fills pages that no
entry names, flushes them, and only then commits the entry; so an entry names pages that were
written whole. What a reader finds there it must verify: its block may have gone since, and the
pages to another.
"""

import ctypes
import errno
import mmap
import os
import re
from pathlib import Path

import numpy as np

from kvstore import record
from kvstore.codecs.codec import Payload
from kvstore.disk.extent import MAP_BYTES, DataFile, behind
from kvstore.errors import CorruptRecord

PAGE_BYTES = 4096
PREFIX = "values-"
NAME = re.compile(PREFIX + "[0-9a-f]{16}")
_LIBC = ctypes.CDLL(None)
_FAILED = ctypes.c_void_p(-1).value  # MAP_FAILED
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_*
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin to write what is dirty, and do not wait


def pages_of(payload_bytes: int) -> int:
    """How many pages a record takes."""
    return 1 + -(-payload_bytes // PAGE_BYTES)


class Values(DataFile):
    """Reads and writes by pages, by any number of threads.

    It is mapped, with room to grow, for copies of what is in the page cache; whoever reads the map
    must guard it: see `kvstore.disk.guard`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, PAGE_BYTES, "r+b")
        self.path = path
        self.map_start = _map(self.handle)
        self.map_end = self.map_start + MAP_BYTES if self.map_start else 0

    def place(self, page: int) -> int:
        """Of the record that starts in `page`, in bytes."""
        return page * PAGE_BYTES

    @property
    def pages(self) -> int:
        """Of the file, the last one in part."""
        return -(-self.size() // PAGE_BYTES)

    def write(self, page: int, header: bytes, payload: Payload) -> None:
        """Write a record, all of its pages to their ends, and let the system begin with it."""
        size = pages_of(payload.nbytes) * PAGE_BYTES
        first = header.ljust(PAGE_BYTES, b"\0")
        zeros = bytes(size - PAGE_BYTES - payload.nbytes)
        parts = [memoryview(part) for part in (first, payload.data, zeros)]
        self._write_all(page * PAGE_BYTES, parts)
        _begin_writing(self.handle, page * PAGE_BYTES, size)

    @property
    def disk_bytes(self) -> int:
        """What the file takes of the disk; holes take nothing."""
        return os.fstat(self.handle).st_blocks * 512

    def punch(self, page: int, pages: int) -> int:
        """Make a hole of pages that nobody needs; how many bytes of the disk that gave back.

        0 as well where the file system has no holes.
        """
        before, call = self.disk_bytes, getattr(_LIBC, "fallocate", None)  # of Linux alone
        if call is not None:
            at, nbytes = (ctypes.c_int64(x * PAGE_BYTES) for x in (page, pages))
            call(self.handle, _PUNCH_HOLE | _KEEP_SIZE, at, nbytes)
        return before - self.disk_bytes

    def sync(self) -> None:
        """Return when all that was written would survive a power cut."""
        os.fdatasync(self.handle)

    def fill(self, page: int, header: bytearray | Payload, payload: Payload) -> bool:
        """Copy a record to where its parts belong; False at the end of the file."""
        between = bytearray(PAGE_BYTES - len(header))
        return self.read(page, [header, between, payload])

    def record(self, page: int, payload_bytes: int) -> memoryview:
        """The bytes of a record, whatever they are. Raises CorruptRecord behind the file's end."""
        found = np.empty(record.HEADER_BYTES + payload_bytes, np.uint8)
        start, payload = np.split(found, [record.HEADER_BYTES])
        if not self.fill(page, start, payload):
            raise CorruptRecord(f"{self.path.name} ends before the record in page {page} does")
        return found.data

    def close(self) -> None:
        if self.map_start:
            _LIBC.munmap(ctypes.c_void_p(self.map_start), ctypes.c_size_t(MAP_BYTES))
            self.map_start = self.map_end = 0
        super().close()

    def _write_all(self, at: int, parts: list[memoryview]) -> None:
        while parts:
            count = os.pwritev(self.handle, parts, at)
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            at, parts = at + count, behind(parts, count)


def _begin_writing(handle: int, at: int, nbytes: int) -> None:
    """Let the disk work while the next records come: less is left for the flush."""
    begin = getattr(_LIBC, "sync_file_range", None)  # of Linux alone
    if begin is not None:  # what goes wrong here, a flush reports
        begin(handle, ctypes.c_int64(at), ctypes.c_int64(nbytes), ctypes.c_uint(_WRITE))


def _map(handle: int) -> int:
    """The address of a map of the whole file and of what it grows by; 0 if there is none.

    Python's own maps end where the file does.
    """
    _LIBC.mmap.restype = ctypes.c_void_p
    size, flags = ctypes.c_size_t(MAP_BYTES), mmap.MAP_SHARED
    start = _LIBC.mmap(None, size, mmap.PROT_READ, flags, handle, ctypes.c_long(0))
    return 0 if start in (None, _FAILED) else int(start)
