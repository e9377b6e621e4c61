"""What many threads use until one of them closes it."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from kvstore.errors import StoreError

P = ParamSpec("P")
R = TypeVar("R")


class Gate:
    """Whoever is inside may rely on all that is open; nobody comes in once it is shut."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._changed = threading.Condition()  # guards everything below
        self._inside = 0
        self._shut = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Raises StoreError once it is shut."""
        with self._changed:
            if self._shut:
                raise StoreError(f"{self._what} is closed")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def shut(self) -> bool:
        """Return when all are out, and nobody comes in any more; False if it was shut already."""
        with self._changed:
            was, self._shut = self._shut, True
            self._changed.wait_for(lambda: not self._inside)
            return not was


@runtime_checkable
class Gated(Protocol):
    gate: Gate


G = TypeVar("G", bound=Gated)


def while_open(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """A method that is inside its object's gate while it runs."""

    @functools.wraps(method)
    def inside(self: G, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.gate.inside():
            return method(self, *args, **kwargs)

    return inside
