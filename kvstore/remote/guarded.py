"""A backend that may fail: asked while it answers, and what went wrong with whose blocks."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from kvstore.errors import Unreachable
from kvstore.remote.backend import RemoteBackend
from kvstore.remote.breaker import Breaker

BAD = 4096  # blocks remembered as bad; the oldest of more are asked for once again
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Guarded:
    """Answers of a backend, or None; and which blocks not to ask for.

    Args:
        discard: have a block deleted that is not as it was written.
        name: of no value, but one that a value might have: what probes ask for.
    """

    def __init__(
        self,
        backend: RemoteBackend,
        breaker: Breaker,
        discard: Callable[[bytes], None],
        *,
        name: bytes,
    ) -> None:
        self.backend, self.breaker, self._discard = backend, breaker, discard
        self._name = name
        self.corrupt = 0
        self._bad: dict[bytes, None] = {}
        self._lock = threading.Lock()

    def ask(self, call: Callable[[RemoteBackend], T]) -> T | None:
        """What the backend answers; None if it does not, or is not asked."""
        if self.breaker.is_open:
            return None
        try:
            answer = call(self.backend)
        except Unreachable as error:
            self.breaker.failed(error)
            return None
        self.breaker.succeeded()
        return answer

    def probe(self) -> None:
        """Ask an open breaker's backend for anything that it may be asked for."""
        try:
            self.backend.resolve()
            self.backend.exists_many([self._name])
        except Unreachable as error:
            self.breaker.failed(error)
        except Exception as error:  # whatever it is, the next probe comes after a pause
            self.breaker.failed(Unreachable(f"{type(error).__name__}: {error}"))
            raise
        else:
            self.breaker.recovered()

    def distrust(self, digest: bytes, reason: str, *, damaged: bool) -> None:
        """Ask no more for a block, until it was deleted there; whole blocks lack nothing.

        Args:
            damaged: a value was wrong, where others may be gone because the server needed room.
        """
        with self._lock:
            if digest in self._bad:
                return
            self._bad[digest] = None
            if len(self._bad) > BAD:
                del self._bad[next(iter(self._bad))]
            self.corrupt += damaged
            first = damaged and self.corrupt == 1
        self._discard(digest)
        if damaged:
            self.breaker.lied(Unreachable(f"a block is not as it was written: {reason}"))
        if first:
            _log.warning(
                "a block of the shared tier at %s is not as it was written, now a miss; more are "
                "only counted: %s: %s", self.backend, digest.hex(), reason,
            )  # fmt: skip

    def verified(self) -> None:
        """Note that a value was as it was written."""
        self.breaker.told_the_truth()

    def trust(self, digest: bytes) -> None:
        with self._lock:
            self._bad.pop(digest, None)

    def is_bad(self, digest: bytes) -> bool:
        return digest in self._bad

    @property
    def bad(self) -> int:
        return len(self._bad)
