"""Where LMDB keeps a large value, and reading it from there without touching the map.

LMDB gives a value of more than half a page pages of its own, and never moves them as long as the
value is not written again:

    page * page_bytes
    [ page header, 16 bytes | value ...                      ][ ... ][ ... rest ]
      mp_pgno u64, mp_pad u16, mp_flags u16, mp_pages u32 (lmdb 0.9, 64 bit)

py-lmdb gives no page numbers, so a writer reads that header in front of the value. What is learnt
so is a hint: whoever reads there must verify what came, and have another way.
"""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

PAGE_HEADER = struct.Struct("<QHHI")
MAP_BYTES = 1 << 40  # of a map that may grow: address space, not memory or disk
UNKNOWN = 0  # a meta page, so never a value's
_OVERFLOW, _DIRTY = 0x04, 0x10  # flags: pages of one value; not yet written


def span(value_bytes: int, page_bytes: int) -> int:
    """How many pages of its own a large value takes."""
    return -(-(value_bytes + PAGE_HEADER.size) // page_bytes)


def first_page(value: memoryview, page_bytes: int) -> int:
    """The first page of a value within a transaction; UNKNOWN if it is small or LMDB another one.

    The 16 bytes before a value are always LMDB's: its page header, or, in a page that it shares
    with others, at least a part of that, of nodes or of values. Whatever they are is checked.
    """
    if 2 * len(value) <= page_bytes:
        return UNKNOWN
    address = np.frombuffer(value, np.uint8).ctypes.data
    header = ctypes.string_at(address - PAGE_HEADER.size, PAGE_HEADER.size)
    page, _, flags, pages = PAGE_HEADER.unpack(header)
    owns = flags & ~_DIRTY == _OVERFLOW and pages == span(len(value), page_bytes)
    return int(page) if owns else UNKNOWN


class DataFile:
    """Positional reads of a file of values in pages, LMDB's or ours, by any number of threads.

    A file descriptor of its own: LMDB locks the lock file alone, so that closing this one
    releases no lock (POSIX drops those of a file with any of its descriptors).
    """

    def __init__(self, path: Path, page_bytes: int, mode: Literal["rb", "r+b"] = "rb") -> None:
        self.page_bytes = page_bytes
        self._file = path.open(mode, buffering=0)
        self.handle = self._file.fileno()

    def read(self, page: int, buffers: Sequence[bytearray | UInt8[np.ndarray, " _"]]) -> bool:
        """Fill buffers from the value that starts in `page`; False at the end of the file."""
        at = self.place(page)
        count = os.preadv(self.handle, buffers, at)  # type: ignore[arg-type]
        left = behind([memoryview(buffer) for buffer in buffers], count)  # type: ignore[arg-type]
        while left and count:
            at += count
            count = os.preadv(self.handle, left, at)
            left = behind(left, count)
        return not left

    def place(self, page: int) -> int:
        """Of the value that starts in `page`, in bytes."""
        return page * self.page_bytes + PAGE_HEADER.size

    def size(self) -> int:
        """Of the file, in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def is_at(self, path: Path) -> bool:
        """Whether it still has the name."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def close(self) -> None:
        self._file.close()
        self.handle = -1  # its number may be another file's by now


def behind(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers behind their first `count` bytes."""
    while buffers and count >= len(buffers[0]):
        count -= len(buffers[0])
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if buffers else []
