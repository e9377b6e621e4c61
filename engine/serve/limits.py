"""How much a tenant may ask for: requests at once, requests and tokens in a minute."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from kvstore.allowance import Allowance


class Exceeded(Exception):
    """A limit is reached. The message is for the client.

    Args:
        what: is limited, "requests" or "tokens".
        retry_s: when it is worth to try again.
    """

    def __init__(self, message: str, what: str, retry_s: float) -> None:
        super().__init__(message)
        self.what, self.retry_s = what, retry_s


class Bucket:
    """An allowance that fills up evenly, to what it gives in a minute. Thread-safe.

    Args:
        what: is counted: "requests" or "tokens".
        per_minute: None for no limit.
        clock: seconds, never backwards.
    """

    def __init__(
        self, what: str, per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._limit = what, per_minute
        self._lock = threading.Lock()  # guards what follows
        self._left = Allowance(per_minute / 60, per_minute, clock) if per_minute else None

    def take(self, amount: int = 1) -> None:
        """Take `amount`; Exceeded where it is not there yet.

        Of more than a full bucket, a full one is enough, and the rest is owed.
        """
        if self._left is None:
            return
        with self._lock:
            delay = self._left.delay_s(amount)
            if not delay:
                self._left.spend(amount)
                return
        message = f"Rate limit reached: {self._limit} {self._what} per minute."
        raise Exceeded(message, self._what, delay)

    def owe(self, amount: int) -> None:
        """Count `amount` that was used already; give back, where it is negative."""
        if self._left is not None:
            with self._lock:
                self._left.spend(amount)


class Slots:
    """So many at once. For one thread.

    Args:
        whose: for messages.
        limit: None for no limit.
    """

    def __init__(self, whose: str, limit: int | None) -> None:
        self._whose, self._limit = whose, limit
        self.taken = 0

    @contextmanager
    def hold(self) -> Generator[None]:
        """One of them. Exceeded where all are taken."""
        if self._limit is not None and self.taken >= self._limit:
            message = f"Too many concurrent requests: {self._whose} {self._limit} at once."
            raise Exceeded(message, "requests", 1.0)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Place:
    """Slots of one request, given back when it is over and nothing works for it any more: a client
    that has left leaves its work behind. For the loop's thread.
    """

    def __init__(self) -> None:
        self._slots = ExitStack()
        self._over, self._working = False, 0

    def take(self, slots: Slots) -> None:
        """One of them. Exceeded where all are taken."""
        self._slots.enter_context(slots.hold())

    def until(self, work: "Future[Any]") -> None:
        """Keep all until this has ended as well."""
        loop = asyncio.get_running_loop()
        self._working += 1

        def ended(_: "Future[Any]") -> None:  # in any thread
            with suppress(RuntimeError):  # the loop is closed: nobody waits for a place
                loop.call_soon_threadsafe(self._ended)

        work.add_done_callback(ended)

    def leave(self) -> None:
        """The request is over."""
        self._over = True
        self._free()

    def _ended(self) -> None:
        self._working -= 1
        self._free()

    def _free(self) -> None:
        if self._over and not self._working:
            self._slots.close()
