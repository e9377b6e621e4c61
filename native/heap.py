"""What the C library keeps of freed memory."""

import ctypes


def give_back() -> None:
    """Return freed memory to the system where the C library can: glibc does, others need not.

    After many requests glibc's heap has holes of all sizes, tens of megabytes that no other
    process can use. Takes some milliseconds, and the next requests fault their pages in again:
    call it when idle.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
