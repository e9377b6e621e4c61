"""How much may be written, so that an SSD lasts."""

import time
from collections.abc import Callable


class Allowance:
    """So many bytes a second over time, and a burst after a pause: a token bucket.

    What is spent may exceed what there is; the next one then waits until the debt is paid.
    """

    def __init__(
        self, bytes_per_s: int, burst_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = bytes_per_s, burst_bytes, clock
        self._left, self._at = float(burst_bytes), clock()

    def delay_s(self) -> float:
        """How long until something may be spent; 0 for now."""
        now = self._clock()
        self._left = min(float(self._burst), self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._left / self._rate)

    def spend(self, nbytes: int) -> None:
        self._left -= nbytes
