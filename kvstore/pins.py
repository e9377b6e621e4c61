"""Blocks that may not be evicted, each for a while."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

PIN_S = 600.0  # how long a pin holds that nobody releases
_log = logging.getLogger(__name__)


class _Open(NamedTuple):
    since: float
    digests: Sequence[bytes]


class Pins:
    """All pins of a store, and whether a block has one. Thread-safe.

    A pin that is never released, as its owner died or forgot it, ends by itself. Then a block may
    go that somebody still reads, who sees a miss. Times are those of a clock that does not jump;
    should it go back, it counts as standing still.

    Args:
        lock: of the store: whoever holds it sees no pin come or go, but for those that expire.
        clock: seconds.
    """

    def __init__(self, lock: threading.RLock, clock: Callable[[], float] = time.monotonic) -> None:
        self.expired = 0
        self._lock, self._clock = lock, clock
        self._last = clock()  # guarded by the lock, as all below
        self._now = 0.0
        self._open: dict[int, _Open] = {}
        self._ends: list[tuple[float, int]] = []  # a heap; some have been released
        self._counts: Counter[bytes] = Counter()
        self._made = 0

    def pin(self, digests: Sequence[bytes], ttl_s: int | float) -> "Pin":
        """Keep blocks, there or not, until the pin is released or `ttl_s` seconds are over."""
        if not 0 < ttl_s < float("inf"):
            raise ValueError(f"ttl_s must be a number of seconds above 0, got {ttl_s}")
        with self._lock:
            self._expire()
            self._made += 1
            self._open[self._made] = _Open(self._now, digests)
            self._counts.update(digests)
            heappush(self._ends, (self._now + ttl_s, self._made))
            return Pin(self, self._made)

    def release(self, number: int) -> None:
        """End a pin; one that ended is fine."""
        with self._lock:
            self._end(number)
            if len(self._ends) > 2 * len(self._open) + 64:
                self._ends = [end for end in self._ends if end[1] in self._open]
                heapify(self._ends)

    @property
    def oldest_s(self) -> float:
        """For how long the oldest of them has held; 0 without any."""
        with self._lock:
            self._expire()
            return self._now - next(iter(self._open.values())).since if self._open else 0.0

    def __len__(self) -> int:
        """Pinned blocks."""
        with self._lock:
            self._expire()
            return len(self._counts)

    def digests(self) -> list[bytes]:
        """Pinned blocks, there or not."""
        with self._lock:
            self._expire()
            return list(self._counts)

    def __contains__(self, digest: object) -> bool:
        with self._lock:
            self._expire()
            return digest in self._counts

    def _expire(self) -> None:
        """End what is over."""
        clock = self._clock()
        self._now += max(0.0, clock - self._last)
        self._last = clock
        while self._ends and self._ends[0][0] <= self._now:
            number = heappop(self._ends)[1]
            if number in self._open:
                blocks = len(self._open[number].digests)
                _log.warning("a pin of %d blocks was not released in time, and ends", blocks)
                self.expired += 1
                self._end(number)

    def _end(self, number: int) -> None:
        ended = self._open.pop(number, None)
        for digest in () if ended is None else ended.digests:
            self._counts[digest] -= 1
            if not self._counts[digest]:
                del self._counts[digest]


class Pin:
    """One pin, which ends when it is released, when its time is over, or with its `with`."""

    def __init__(self, pins: Pins, number: int) -> None:
        self._pins, self._number = pins, number

    def release(self) -> None:
        """Let the blocks go. Idempotent."""
        self._pins.release(self._number)

    def __enter__(self) -> "Pin":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
