"""The page cache: how much of some files is in it, and emptied of them."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

LIBC = ctypes.CDLL(None, use_errno=True)


def drop(paths: Iterable[Path]) -> None:
    """Write these files to the disk and drop their pages; those that a process maps stay."""
    for path in paths:
        handle = os.open(path, os.O_RDWR)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resident_share(paths: Iterable[Path]) -> float:
    """The share of the files' pages that mincore finds in the page cache."""
    pages = found = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            count = -(-len(view) // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * count)()
            mapped = np.frombuffer(view, np.uint8)
            address, length = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(view))
            assert LIBC.mincore(address, length, vector) == 0
            found += int((np.frombuffer(vector, np.uint8) & 1).sum())
            pages += count
            del mapped
    return found / pages


def rest(seconds: float) -> None:
    """Let the disk finish what it was given, and then do nothing."""
    os.sync()
    time.sleep(seconds)
