"""Large pages for large buffers."""

import ctypes
import mmap
import sys

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
