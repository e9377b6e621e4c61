"""Blocks on their way to a slow tier, in a thread of their own."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvstore.errors import StoreError
from kvstore.tier import Item

BATCH_BYTES = 64 << 20  # one flush of the device for so much
QUEUE_BYTES = 256 << 20


class Writer:
    """Calls `write` with batches of what was given to `put`, in that order.

    The queue is bounded: `put` waits while it is over `queue_bytes`. An error of a batch loses that
    batch, not the thread, and is raised by the next `flush`, once.
    """

    def __init__(
        self, write: Callable[[Sequence[Item]], object], queue_bytes: int = QUEUE_BYTES
    ) -> None:
        self._write = write
        self._limit = queue_bytes
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()  # guards everything below, and the queue
        self.queued_bytes = 0  # waiting or being written
        self._put_count = self._done_count = 0
        self._error: StoreError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="headrace-writer", daemon=True)
        self._thread.start()

    def put(self, blocks: Sequence[Item]) -> None:
        with self._changed:
            for item in blocks:
                self._changed.wait_for(lambda: self.queued_bytes < self._limit or self._closing)
                if self._closing:
                    raise StoreError("the store is closed")
                self._queue.append(item)
                self.queued_bytes += item[1].nbytes
                self._put_count += 1
                self._changed.notify_all()

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

    def flush(self) -> None:
        """Return when all that was put before is written. Raises what went wrong since the last."""
        with self._changed:
            target = self._put_count
            self._changed.wait_for(lambda: self._done_count >= target)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Write what is queued and end the thread; then as `flush`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while batch := self._next():
            error = self._attempt(batch)
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
            batch = next(batches(self._queue), [])
            for _ in batch:
                self._queue.popleft()
            return batch


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
