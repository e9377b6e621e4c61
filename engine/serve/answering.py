"""One request in the service, as the server's event loop sees it."""

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING

from engine.rag.shelf import Reading
from engine.request import Completion, Event
from engine.serve.faults import UNNOTED, logged
from engine.service.ask import Ask, Failure, Ticket

if TYPE_CHECKING:
    from engine.service.service import Service


class Answering:
    """Events as they come. Close it: that cancels what is not over, and settles what was read as
    soon as the service has said its last word, after which no KV is stored.

    Made and awaited by the loop's thread; `start` may be called by another, and even after `close`.

    Attributes:
        completion: of the last event, once it was given out.

    Args:
        threads: where all is done that may have to wait.
    """

    def __init__(self, service: "Service", threads: Executor) -> None:
        self.completion: Completion | None = None
        self._service, self._threads = service, threads
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, Event | Failure]] = deque()
        self._came = asyncio.Event()
        self._ask: Ask | None = None
        self._lock = threading.Lock()  # guards what follows
        self._ticket: Ticket | None = None
        self._reading: Reading | None = None  # that has begun
        self._tokens: list[int] = []  # that the service has made, whether given out or not
        self._done: Completion | None = None
        self._over = self._closed = False  # the service has said its last word; nobody waits

    def start(self, ask: Ask, reading: Reading | None) -> None:
        """Submit a request, and begin and end its reading.

        Raises:
            PromptError, Busy, ServerStopping: see `Service.submit`.
        """
        self._ask = ask
        if reading is not None:
            reading.begin()
        try:
            ticket = self._service.submit(ask, self._listen)
        except BaseException:
            if reading is not None:
                reading.withdraw()
            raise
        with self._lock:
            self._ticket, self._reading = ticket, reading
            late = self._closed
        if late:  # nobody else will
            self._settle_alone()

    async def some(self, timeout_s: float | None = None) -> list[Event]:
        """What came since the last call, at least one event; none where the time was over.

        Raises:
            Exception: the request has failed; what came before was given out.
        """
        if not self._waiting:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._came.wait()
        self._came.clear()
        events: list[Event] = []
        while self._waiting:
            said_ns, event = self._waiting[0]
            if isinstance(event, Failure) and events:
                break  # next time
            self._waiting.popleft()
            if self._ask is not None and self._ask.trace is not None:
                self._ask.trace.add("detokenise", said_ns, time.perf_counter_ns())
            if isinstance(event, Failure):
                try:
                    raise event.error
                finally:
                    del event  # whose error knows this frame
            events.append(event)
            self.completion = event.completion
        return events

    async def all(self) -> list[Event]:
        """Every event, when the last one is there."""
        events: list[Event] = []
        while self.completion is None:
            events += await self.some()
        return events

    @property
    def generated(self) -> int:
        """Tokens that the service has made so far, also of those that were not given out."""
        with self._lock:
            return len(self._tokens)

    async def settled(self) -> None:
        """What was read is noted: who deletes a document from now on, deletes all that is left."""
        if self._reading is not None:
            await self._loop.run_in_executor(self._threads, self._settle)

    def close(self) -> None:
        """It is over, or nobody wants it any more. Does not wait."""
        with self._lock:
            started = self._ticket is not None and not self._closed
            self._closed = True
        if started:
            self._threads.submit(self._settle_alone)

    def _settle_alone(self) -> None:
        """As `_settle`, where nobody waits for it."""
        logged(self._settle, UNNOTED)

    def _settle(self) -> None:
        """Note what was read, if it is over; else cancel it, and do so then."""
        with self._lock:
            over, ticket = self._over, self._ticket
            reading = self._reading if over else None
            self._reading = None if over else self._reading
        if reading is not None:
            reading.end(self._tokens, self._done)
        elif not over and ticket is not None:
            self._service.cancel(ticket)

    def _listen(self, event: Event | Failure) -> None:
        """Called by the service's thread."""
        with self._lock:
            if isinstance(event, Event):
                self._tokens.append(event.token)
                self._done = event.completion
            self._over = isinstance(event, Failure) or event.completion is not None
            last = self._over and self._closed and self._reading is not None
        if last:  # nobody else will
            self._threads.submit(self._settle_alone)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._take, time.perf_counter_ns(), event)

    def _take(self, said_ns: int, event: Event | Failure) -> None:
        self._waiting.append((said_ns, event))
        self._came.set()
