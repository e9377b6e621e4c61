"""Blocks on their way to a slow tier, in a thread of their own."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvstore.allowance import Allowance
from kvstore.errors import StoreError
from kvstore.tier import Item

_log = logging.getLogger(__name__)

BATCH_BYTES = 64 << 20  # one flush of the device for so much
QUEUE_BYTES = 256 << 20
AGAIN_S = 60.0  # from one line in the log to the next


class Writer:
    """Calls `write` with batches of what was given to `put`, in that order.

    The queue is bounded: `put` waits while it is over `queue_bytes`, for a device that is slow.
    It does not wait for an allowance: what does not fit the queue then is left out. An error of a
    batch loses that batch, not the thread, and is raised by the next `flush`, once. The log has it
    at once, and every `AGAIN_S`, as a server may not flush before it ends.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Item]], object],
        queue_bytes: int = QUEUE_BYTES,
        allowance: Allowance | None = None,
    ) -> None:
        self._write, self._allowance = write, allowance
        self._limit = queue_bytes
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()  # guards everything below, and the queue
        self.queued_bytes = 0  # waiting or being written
        self._put_count = self._done_count = 0
        self._error: StoreError | None = None
        self._told_s = -math.inf  # when the log was
        self._closing = self._hurried = False
        self._thread = threading.Thread(target=self._run, name="headrace-writer", daemon=True)
        self._thread.start()

    def put(self, blocks: Sequence[Item]) -> int:
        """Queue blocks; how many were left out."""
        with self._changed:
            for count, item in enumerate(blocks):
                if self._allowance is not None and self.queued_bytes >= self._limit:
                    return len(blocks) - count
                self._changed.wait_for(lambda: self.queued_bytes < self._limit or self._closing)
                if self._closing:
                    raise StoreError("the store is closed")
                self._queue.append(item)
                self.queued_bytes += item[1].nbytes
                self._put_count += 1
                self._changed.notify_all()
        return 0

    def offer(self, blocks: Sequence[Item]) -> None:
        """As `put`, of as many as find room now: nobody waits, and what is left out is no loss."""
        with self._changed:
            for item in blocks:
                if self.queued_bytes >= self._limit or self._closing:
                    return
                self._queue.append(item)
                self.queued_bytes += item[1].nbytes
                self._put_count += 1
                self._changed.notify_all()

    def settle(self) -> None:
        """Return when all that was put before is written, or could not be."""
        with self._changed:
            target = self._put_count
            self._changed.wait_for(lambda: self._done_count >= target)

    def flush(self) -> None:
        """As `settle`. Raises what went wrong since the last time."""
        self.settle()
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def hurry(self) -> None:
        """Wait for no allowance any more: somebody wants to close it."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is queued, at once, and end the thread; then as `flush`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while batch := self._next():
            error = self._attempt(batch)
            if error is not None and time.monotonic() - self._told_s >= AGAIN_S:
                _log.warning("%d blocks were not stored: %s", len(batch), error)
                self._told_s = time.monotonic()
            with self._changed:
                self._error = self._error or error
                self._done_count += len(batch)
                self.queued_bytes -= sum(block.nbytes for _, block in batch)
                self._changed.notify_all()

    def _attempt(self, batch: Sequence[Item]) -> StoreError | None:
        try:
            self._write(batch)
        except StoreError as error:
            return error
        except Exception as error:  # the thread must live on, and flush must hear of it
            wrapped = StoreError(f"writing {len(batch)} blocks failed: {error!r}")
            wrapped.__cause__ = error
            return wrapped
        return None

    def _next(self) -> list[Item]:
        """The next batch, of at least one block; empty when closing and all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._wait_for_allowance()
            batch = next(batches(self._queue), [])
            for _ in batch:
                self._queue.popleft()
            if self._allowance is not None:
                self._allowance.spend(sum(block.nbytes for _, block in batch))
            return batch

    def _wait_for_allowance(self) -> None:
        while self._allowance is not None and not (self._closing or self._hurried):
            delay = self._allowance.delay_s()
            if not delay:
                return
            self._changed.wait(delay)


def batches(blocks: Iterable[Item]) -> Iterator[list[Item]]:
    """The blocks, in runs of at most BATCH_BYTES, or of one block."""
    batch: list[Item] = []
    size = 0
    for item in blocks:
        if batch and size + item[1].nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[1].nbytes
    if batch:
        yield batch
