"""What the C library keeps of freed memory."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
ARENAS = 2
LARGEST = 32 << 20  # of what glibc takes from a heap at most


def few_arenas() -> None:
    """Let all threads share two heaps where the C library is glibc, whose default is 8 a core.

    What one thread frees, others then use. Call it before there are threads.
    """
    _adjust(M_ARENA_MAX, ARENAS)


def keep_freed(nbytes: int) -> None:
    """Let a heap keep so much memory at its end that was freed, where the C library is glibc.

    It would return it to the system, and fault it in again for the next use of as much: zeroed,
    page by page. For work in rounds of many allocations of up to 32 MiB, as LMDB's transactions
    are. `give_back` still returns it.
    """
    _adjust(M_MMAP_THRESHOLD, LARGEST)
    _adjust(M_TRIM_THRESHOLD, nbytes)
    _adjust(M_TOP_PAD, nbytes)


def give_back() -> None:
    """Return freed memory to the system where the C library can: glibc does, others need not.

    After many requests glibc's heap has holes of all sizes, tens of megabytes that no other
    process can use. Takes some milliseconds, and the next requests fault their pages in again:
    call it when idle.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _adjust(option: int, value: int) -> None:
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(ctypes.c_int(option), ctypes.c_int(value))
