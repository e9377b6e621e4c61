"""What many threads use until one of them closes it."""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from kvstore.errors import StoreError

P = ParamSpec("P")
R = TypeVar("R")


class Gate:
    """Whoever is inside may rely on all that is open; nobody else comes in once it is shut.

    It knows threads and counts nothing: one that was interrupted on its way out, or that a fork
    left behind, keeps nobody from shutting it. A forked child, which lacks the threads that the
    others wait for, may do just that.
    """

    def __init__(self, what: str) -> None:
        self._what, self._pid = what, os.getpid()
        self._inside: list[threading.Thread] = []  # each as often as it came in
        self._shut = False
        self._changed = threading.Condition()

    @property
    def is_left_behind(self) -> bool:
        """Whether this is a child of the process that made it."""
        return os.getpid() != self._pid

    def enter(self) -> None:
        """Come in; `leave` must follow, whatever happens. StoreError for who may not."""
        if self.is_left_behind:
            raise StoreError(f"{self._what} was opened before a fork: open it in the child")
        me = threading.current_thread()
        self._inside.append(me)  # first, so that who shuts it sees either this or who was refused
        if self._shut and self._inside.count(me) == 1:
            raise StoreError(f"{self._what} is closed")

    def leave(self) -> None:
        with suppress(ValueError):  # interrupted before it was in
            self._inside.remove(threading.current_thread())
        if self._shut:
            with self._changed:
                self._changed.notify_all()

    def shut(self) -> None:
        """Return when all others are out. If that is interrupted, it is open again."""
        me = threading.current_thread()
        try:
            with self._changed:
                self._shut = True
                self._changed.wait_for(
                    lambda: not any(x is not me and x.is_alive() for x in [*self._inside])
                )
        except BaseException:
            self._shut = False
            raise


@runtime_checkable
class Gated(Protocol):
    gate: Gate


G = TypeVar("G", bound=Gated)


def while_open(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """A method that is inside its object's gate while it runs."""

    @functools.wraps(method)
    def inside(self: G, /, *args: P.args, **kwargs: P.kwargs) -> R:
        gate = self.gate
        try:
            gate.enter()
            return method(self, *args, **kwargs)
        finally:
            gate.leave()

    return inside
