"""Pages of memory: large ones for large buffers, and buffers that give theirs back."""

import ctypes
import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20  # below it no aligned large page is certain to fit


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


def own_pages(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer in host memory, all zeros, in small pages that nothing else lies on.

    The system backs each page when it is first touched, and has all of them back as soon as the
    buffer is freed, which an allocator's memory need not have. Where it would give large pages
    unasked, it is asked not to: they would be backed whole.
    """
    nbytes = math.prod(size) * dtype.itemsize
    with torch.inference_mode(False):  # whoever writes later need not be in that mode
        if nbytes == 0:
            return torch.empty(size, dtype=dtype)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            with suppress(OSError):  # a kernel that has none
                pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=dtype).view(size)
