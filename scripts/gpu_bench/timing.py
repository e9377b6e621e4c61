"""Times of work on a GPU: graphs of many calls, on inputs that no cache holds."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ROUNDS = 21  # replays that are timed
LEAST_CALLS = 16  # in one graph: then the gap between replays is small beside it
COPY_BYTES = 2 << 30  # moved one way by the copies that are the ceilings
CACHE_BYTES = 256 << 20  # four times the L2 of an H200: inputs together are larger


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one call: over the rounds, each the mean of its calls."""

    median_s: float
    p90_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[int(0.9 * (len(ordered) - 1))])


def time_calls(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    graph: bool = True,
    rounds: int = ROUNDS,
) -> Times | None:
    """The time of one of `calls`, which run one after the other, round after round.

    On a CPU each runs once, and nothing is timed.

    Args:
        graph: replay them from a CUDA graph; False for what cannot be captured.
    """
    if device.type != "cuda":
        for call in calls:
            call()
        return None
    repeated = list(calls) * -(-LEAST_CALLS // len(calls))
    run = _captured(repeated) if graph else _in_turn(repeated)
    return Times.of([x / len(repeated) for x in elapsed(run, rounds)])


def elapsed(run: Callable[[], object], rounds: int, *, warm: int = 2) -> list[float]:
    """Seconds of each of `rounds` runs, by events on the device."""
    for _ in range(warm):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile, handles are made
        _in_turn(calls)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [call() for call in calls]  # each has memory of its own: no cache holds it all
    del made  # the graph goes on writing there
    return graph.replay


def synchronized(device: torch.device) -> float:
    """The clock, when the device has done all that was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sets_for(nbytes: int) -> int:
    """How many sets of inputs of this size are together larger than a cache."""
    return max(2, min(64, math.ceil(CACHE_BYTES / max(1, nbytes))))


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated here holds NaN and large numbers, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What large copies reach, in bytes a second; None where nothing is timed."""

    device: float | None  # bytes read and written
    host: float | None  # page-locked memory to the device

    def of(self, link: str) -> float | None:
        return self.host if link == "pcie" else self.device


def ceilings(device: torch.device) -> Ceilings:
    """Measured now, once: one large copy inside the device, one from the host."""
    if device.type != "cuda":
        return Ceilings(None, None)
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_(0, 256)
    there = torch.empty_like(here)
    inside = statistics.median(elapsed(lambda: there.copy_(here), 11))
    part = COPY_BYTES // 2
    host = torch.empty(part, dtype=torch.uint8, pin_memory=True)
    host.copy_(here[:part])
    up = statistics.median(elapsed(lambda: there[:part].copy_(host, non_blocking=True), 7))
    return Ceilings(2 * COPY_BYTES / inside, part / up)


def free_memory() -> None:
    """Give back what is no longer used, so that the next contender has all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
