"""Work that can wait: taken a slice at a time, between the steps of requests."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from engine.slices import Slices

T = TypeVar("T")
PATIENCE = 8  # steps that read prompts, after which a slice is taken beside them


class _Chore(NamedTuple):
    work: Callable[[], Slices[Any]]
    future: Future[Any]


class Chores:
    """First come, first served. Added to by any thread that holds the service's door."""

    def __init__(self) -> None:
        self._waiting: deque[_Chore] = deque()
        self._now: tuple[Slices[Any], Future[Any]] | None = None
        self._passed = 0  # steps since the last slice

    def __len__(self) -> int:
        return len(self._waiting) + (self._now is not None)

    def add(self, work: Callable[[], Slices[T]]) -> Future[T]:
        """What the work returns, or what went wrong; cancelling it ends it after its slice."""
        future: Future[T] = Future()
        self._waiting.append(_Chore(work, future))
        return future

    def take(self, *, reading: bool) -> bool:
        """A slice, unless a step with prompts had its turn just before; whether there was any.

        Args:
            reading: this step read prompts: only every `PATIENCE`-th of them has a slice, too, so
                that answers do not pause for long and the work ends all the same.
        """
        self._passed += 1
        if reading and self._passed < PATIENCE:
            return bool(self)
        self._passed = 0
        if self._now is None and not self._next():
            return False
        assert self._now is not None
        work, future = self._now
        if future.cancelled():
            self._over(work)
            return True
        try:
            next(work)
        except StopIteration as end:
            self._over(work)
            with suppress(InvalidStateError):  # cancelled just now
                future.set_result(end.value)
        except Exception as error:
            self._over(work)
            with suppress(InvalidStateError):
                future.set_exception(error)
        return True

    def cancel(self) -> None:
        """End all of it."""
        if self._now is not None:
            work, future = self._now
            self._over(work)
            future.cancel()
        while self._waiting:
            self._waiting.popleft().future.cancel()

    def _next(self) -> bool:
        """Begin the next that nobody cancelled."""
        while self._waiting:
            work, future = self._waiting.popleft()
            if not future.cancelled():
                self._now = work(), future
                return True
        return False

    def _over(self, work: Slices[Any]) -> None:
        self._now = None
        work.close()
