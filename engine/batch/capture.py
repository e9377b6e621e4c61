"""Capturing a CUDA graph so that whatever goes wrong leaves the thread as it was."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

CAPTURES = threading.Lock()  # torch captures one graph at a time in a process


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is launched inside becomes the graph, and does not run.

    `torch.cuda.graph` leaves the thread on the capture's stream where the end of a capture fails,
    and its own stream is on the device of the process's first capture. No garbage is collected
    inside: a finalizer may call what no capture allows.

    Args:
        stream: of the graph's device, and nobody else's.
    """
    with CAPTURES:
        gc.collect()
        torch.cuda.synchronize(stream.device)
        torch.cuda.empty_cache()
        collects = gc.isenabled()
        gc.disable()
        try:
            pool = torch.cuda.graph_pool_handle()
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    _end(graph, stream, pool)
        finally:
            if collects:
                gc.enable()


def _end(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """End a capture, also for the allocator, which torch leaves capturing where the end fails."""
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):  # that it has ended for it already
            torch._C._cuda_endAllocateToPool(torch.device(stream.device).index, pool)
        raise


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that the device has no memory left.

    The end of a capture fails with an error of its own, of CUDA's.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
