"""Work that can wait: taken a slice at a time, between the steps of requests."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from engine.slices import Slices

T = TypeVar("T")
PATIENCE = 8  # steps that read prompts, after which a slice is taken beside them


class Chore:
    """One piece of such work. Cancelling its future ends it before its next slice."""

    def __init__(self, work: Callable[[], Slices[Any]], owner: str) -> None:
        self.owner, self.over = owner, False
        self.future: Future[Any] = Future()
        self._make = work
        self._slices: Slices[Any] | None = None

    def slice(self) -> None:
        """Do a part of it. It does not raise: what went wrong is the future's."""
        try:
            if self.future.cancelled():
                self.end()
                return
            if self._slices is None:
                self._slices = self._make()
            next(self._slices)
        except StopIteration as end:
            self.end()
            with suppress(InvalidStateError):  # cancelled just now
                self.future.set_result(end.value)
        except Exception as error:
            self.end()
            with suppress(InvalidStateError):
                self.future.set_exception(error)

    def end(self) -> None:
        """No more of it."""
        self.over = True
        if self._slices is not None:
            self._slices.close()


class Chores:
    """Owners take turns, each with its own work in order. All calls are made with the door held."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Chore]] = {}  # by owner, whose turn it is first
        self._now: Chore | None = None
        self._passed = 0  # steps since the last slice

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values())) + (self._now is not None)

    def add(self, work: Callable[[], Slices[T]], owner: str) -> Future[T]:
        """What the work returns, or what went wrong."""
        chore = Chore(work, owner)
        self._waiting.setdefault(owner, deque()).append(chore)
        return chore.future

    def next(self, *, reading: bool) -> Chore | None:
        """Of whom a slice is to be taken now; `put_back` follows.

        Args:
            reading: this step read prompts: only every `PATIENCE`-th of them has a slice, too, so
                that answers do not pause for long and the work ends all the same.
        """
        self._passed += 1
        if not self._waiting or (reading and self._passed < PATIENCE):
            return None
        self._passed = 0
        owner, line = next(iter(self._waiting.items()))
        self._now = line.popleft()
        del self._waiting[owner]
        if line:
            self._waiting[owner] = line  # behind the others
        return self._now

    def put_back(self, chore: Chore) -> None:
        """A slice of it was taken; what is left of it comes first when its owner's turn comes."""
        self._now = None
        if not chore.over:
            self._waiting.setdefault(chore.owner, deque()).appendleft(chore)

    def cancel(self) -> None:
        """End all of it."""
        for line in self._waiting.values():
            for chore in line:
                chore.end()
                chore.future.cancel()
        self._waiting.clear()
        self._now = None
