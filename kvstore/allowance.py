"""How much may be used over time."""

import time
from collections.abc import Callable


class Allowance:
    """So much a second over time, and a burst after a pause: a token bucket. For one thread.

    What is spent may exceed what there is; the next one then waits until the debt is paid.

    Args:
        per_s: of bytes, requests, or whatever is counted.
        burst: the most that is saved up, and what there is at first.
        clock: seconds, never backwards.
    """

    def __init__(
        self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = per_s, burst, clock
        self._left, self._at = float(burst), clock()

    def delay_s(self, amount: int = 0) -> float:
        """How long until there is `amount`, or a full burst where that is less; 0 for now."""
        now = self._clock()
        self._left = min(float(self._burst), self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (min(amount, self._burst) - self._left) / self._rate)

    def spend(self, amount: int) -> None:
        """Count `amount`; give back, where it is negative."""
        self._left -= amount
