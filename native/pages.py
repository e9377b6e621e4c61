"""Pages of memory: large ones for large buffers, and buffers that give theirs back."""

import ctypes
import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20  # below it no aligned large page is certain to fit
LARGE_BYTES = 2 << 20
ALIGNED_BYTES = 4096  # what every disk and file system can write to by itself


def large_pages(buffer: Tensor) -> Tensor:
    """The same buffer, which Linux is asked to back with pages of 2 MiB when it is first touched.

    A step of decode walks through a whole KV cache; with pages of 4 KiB, looking up where each
    lies takes part of the time. Does nothing to small buffers, on a device, or on other systems; a
    kernel that grants none is no error.
    """
    if sys.platform != "linux" or buffer.device.type != "cpu" or buffer.nbytes < LEAST_BYTES:
        return buffer
    start, size = buffer.data_ptr(), mmap.PAGESIZE
    first, end = -(-start // size) * size, (start + buffer.nbytes) // size * size
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE
    )
    return buffer


def aligned(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer in host memory, of whatever numbers, that a disk can write to by itself."""
    nbytes = math.prod(size) * dtype.itemsize
    room = torch.empty(nbytes + ALIGNED_BYTES, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNED_BYTES
    return room[start : start + nbytes].view(dtype).view(size)


@torch.inference_mode(False)  # whoever writes later need not be in that mode
def own_pages(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer in host memory, all zeros, in small pages that nothing else lies on.

    The system backs each page when it is first touched, and has all of them back as soon as the
    buffer is freed, which an allocator's memory need not have. Where it would give large pages
    unasked, it is asked not to: they would be backed whole.
    """
    nbytes = math.prod(size) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(size, dtype=dtype)
    return _own(nbytes, "MADV_NOHUGEPAGE").view(dtype).view(size)


@torch.inference_mode(False)
def own_large_pages(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same in pages of 2 MiB, where the system grants them: for what a disk will fill.

    While it does, the system holds on to every page, and of these there are fewer then.
    """
    nbytes = math.prod(size) * dtype.itemsize
    room = _own(nbytes + LARGE_BYTES, "MADV_HUGEPAGE")
    start = -room.data_ptr() % LARGE_BYTES
    return room[start : start + nbytes].view(dtype).view(size)


def _own(nbytes: int, advice: str) -> Tensor:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel that has no large pages
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)
