"""When to stop asking a server that does not answer."""

import logging
import random
import threading
import time
from collections.abc import Callable

from kvstore.errors import TimedOut, Unreachable

FAILURES = 3  # in a row, until the server is set aside
LIES = 3  # values in a row that were not as they were written: the same
_log = logging.getLogger(__name__)


class Breaker:
    """Closed: the server is asked. Open: it is not, but for one probe after each pause.

    A time-out opens it at once, since a second one would be a second stall; other failures cost
    little, and three in a row open it. So do three damaged values: reading them takes as long as
    reading good ones, for nothing. Pauses differ by chance, so that machines
    that lost a server together do not come back together. It starts open, with a probe due.

    Args:
        changed: its lock guards everything here; notified when the breaker opens or closes.
    """

    def __init__(
        self,
        name: str,
        pause_s: float,
        changed: threading.Condition,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._name, self._pause_s, self._changed = name, pause_s, changed
        self._clock, self._chance = clock, chance
        self.is_open = True
        self._told = False  # of this time that it is open
        self._due = clock()
        self._row = self._lies = 0
        self.failures = self.time_outs = self.openings = 0

    def due_in(self) -> float | None:
        """Seconds until the next probe; None while closed."""
        with self._changed:
            return max(0.0, self._due - self._clock()) if self.is_open else None

    def succeeded(self) -> None:
        """Note an answer; one that was asked for before the breaker opened does not close it."""
        with self._changed:
            self._row = 0

    def recovered(self) -> None:
        """Note that a probe was answered."""
        with self._changed:
            self._row = 0
            self.is_open = self._told = False
            self._changed.notify_all()
            _log.info("the shared tier at %s answers", self._name)

    def told_the_truth(self) -> None:
        """Note a value that was as it was written."""
        if self._lies:
            with self._changed:
                self._lies = 0

    def lied(self, error: Unreachable) -> None:
        """Note a value that was not."""
        with self._changed:
            self._lies += 1
            if self._lies >= LIES and not self.is_open:
                self._lies = 0
                self._open(error)

    def failed(self, error: Unreachable) -> None:
        with self._changed:
            self.failures += 1
            self._row += 1
            self.time_outs += isinstance(error, TimedOut)
            if self.is_open or isinstance(error, TimedOut) or self._row >= FAILURES:
                self._open(error)

    def _open(self, error: Unreachable) -> None:
        pause = self._pause_s * (0.5 + self._chance())
        self._due = self._clock() + pause
        self.openings += not self.is_open
        self.is_open = True
        self._changed.notify_all()
        if not self._told:
            self._told = True
            _log.warning(
                "the shared tier at %s is set aside, all it has is a miss until it answers: %s",
                self._name, error,
            )  # fmt: skip
