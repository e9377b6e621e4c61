"""What the C library keeps of freed memory."""

import ctypes

M_ARENA_MAX = -8  # glibc's malloc.h
ARENAS = 2


def few_arenas() -> None:
    """Let all threads share two heaps where the C library is glibc, whose default is 8 a core.

    What one thread frees, others then use. Call it before there are threads.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(ctypes.c_int(M_ARENA_MAX), ctypes.c_int(ARENAS))


def give_back() -> None:
    """Return freed memory to the system where the C library can: glibc does, others need not.

    After many requests glibc's heap has holes of all sizes, tens of megabytes that no other
    process can use. Takes some milliseconds, and the next requests fault their pages in again:
    call it when idle.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
