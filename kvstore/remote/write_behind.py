"""A thread that gives the server what is new, and looks after it while it is away."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from kvstore.block import BlockKey
from kvstore.remote.breaker import Breaker
from kvstore.tier import Item

BATCH_BYTES = 8 << 20
_log = logging.getLogger(__name__)


@runtime_checkable
class Chores(Protocol):
    """What the thread does. None of these raises StoreError."""

    def write(self, blocks: Sequence[Item]) -> None: ...
    def discard(self, digests: Sequence[bytes]) -> None: ...
    def probe(self) -> None: ...


class WriteBehind:
    """Blocks that wait to be sent. Nobody waits for them: what finds no room is not sent.

    While the breaker is open nothing is taken, what waits stays, and the thread probes the server.
    """

    def __init__(
        self, chores: Chores, breaker: Breaker, changed: threading.Condition, queue_bytes: int
    ) -> None:
        self._chores, self._breaker, self._limit = chores, breaker, queue_bytes
        self._changed = changed  # guards everything below
        self._queue: deque[Item] = deque()
        self._discards: deque[bytes] = deque()
        self._writing: list[Item] = []
        self._busy = self._closing = False
        self.queued_bytes = 0  # waiting or being sent
        self._thread = threading.Thread(target=self._run, name="headrace-remote", daemon=True)
        self._thread.start()

    def offer(self, blocks: Sequence[Item]) -> int:
        """Queue blocks, parents first, as far as there is room; how many found none.

        A block is of no use there without those before it, so nothing follows one left out.
        """
        with self._changed:
            for count, item in enumerate(blocks):
                nbytes = item[1].nbytes
                left_out = self._breaker.is_open or self._closing
                if left_out or self.queued_bytes + nbytes > self._limit:
                    return len(blocks) - count
                self._queue.append(item)
                self.queued_bytes += nbytes
            self._changed.notify_all()
        return 0

    def discard(self, digests: Sequence[bytes]) -> None:
        """Have blocks deleted, some time."""
        with self._changed:
            self._discards.extend(digests)
            self._changed.notify_all()

    def forget(self, digests: frozenset[bytes]) -> None:
        """Send none of these afterwards; returns when none is being sent."""
        with self._changed:
            kept = [item for item in self._queue if item[0].digest not in digests]
            self.queued_bytes -= sum(block.nbytes for _, block in self._queue)
            self._queue = deque(kept)
            self.queued_bytes += sum(block.nbytes for _, block in kept)
            self._changed.wait_for(lambda: not any(_digest(i) in digests for i in self._writing))

    def drain(self, timeout_s: float) -> bool:
        """Whether all that waited is done, within a time."""
        with self._changed:
            return self._changed.wait_for(self._is_done, timeout_s)

    def close(self, timeout_s: float) -> int:
        """Send what waits, as far as time and the server allow; how many blocks were not sent."""
        until = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = len(self._queue)
            self._queue.clear()
            self._discards.clear()
        self._thread.join(max(0.0, until - time.monotonic()))
        return left

    def _is_done(self) -> bool:
        return not (self._queue or self._discards or self._busy)

    def _run(self) -> None:
        while (chore := self._next()) is not None:
            try:
                chore()
            except Exception:  # the thread must live on
                _log.exception("the shared tier: a piece of work in the background failed")
            with self._changed:
                self.queued_bytes -= sum(block.nbytes for _, block in self._writing)
                self._writing, self._busy = [], False
                self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """What to do; None at the end."""
        with self._changed:
            while True:
                due_s = self._breaker.due_in()
                if self._closing and (due_s is not None or not self._queue):
                    return None
                chore = self._chore(due_s)
                if chore is not None:
                    self._busy = True
                    return chore
                self._changed.wait(due_s)

    def _chore(self, due_s: float | None) -> Callable[[], None] | None:
        if due_s is not None:
            return self._chores.probe if due_s == 0 else None
        if self._discards:
            digests = list(self._discards)
            self._discards.clear()
            return lambda: self._chores.discard(digests)
        if not self._queue:
            return None
        batch = self._writing = self._batch()
        return lambda: self._chores.write(batch)

    def _batch(self) -> list[Item]:
        batch: list[Item] = []
        size = 0
        while self._queue and (not batch or size + self._queue[0][1].nbytes <= BATCH_BYTES):
            batch.append(self._queue.popleft())
            size += batch[-1][1].nbytes
        return batch


def _digest(item: Item) -> bytes:
    key: BlockKey = item[0]
    return key.digest
