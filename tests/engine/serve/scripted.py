"""A service that does what a test says, and a server in front of it."""

from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from queue import Queue
from typing import Any

from engine.blend.segments import Segments
from engine.engine import Engine
from engine.errors import Cancelled, ServerStopping
from engine.request import Completion, Event, FinishReason, RequestStats
from engine.service.ask import Ask, Failure, Listener, Ticket
from engine.service.service import Service
from engine.service.stats import ServiceStats
from engine.slices import Slices, drained
from tests.engine.serve.server import LIMIT_S


class Submitted:
    """A request that was submitted, and is answered by the test."""

    def __init__(self, ask: Ask, listener: Listener, ticket: Ticket) -> None:
        self.ask, self.ticket = ask, ticket
        self._listener, self._said = listener, ""
        self._count = 0

    def say(self, text: str) -> None:
        """One token."""
        self._said += text
        self._count += 1
        self._listener(Event(self._count, text))

    def end(self, text: str = "", reason: FinishReason = "stop") -> None:
        """The last token."""
        self._count += 1
        tokens = list(range(1, self._count + 1))
        prompt = self.ask.prompt
        length = len(prompt.tokens if isinstance(prompt, Segments) else prompt)
        stats = RequestStats(length, 0, 0.1, 0.2, self._count)
        done = Completion(tokens, self._said + text, reason, stats)
        self._listener(Event(self._count, text, done))

    def fail(self, error: Exception) -> None:
        self._listener(Failure(error))


class Scripted(Service):
    """Takes requests, and does nothing for them.

    Attributes:
        refusal: raised by `submit`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.refusal: Exception | None = None
        self.cancelled: Queue[Ticket] = Queue()
        self._asked: Queue[Submitted] = Queue()
        self._live: dict[Ticket, Submitted] = {}  # type: ignore[assignment]
        self._numbers = count(1)
        self._draining = False

    def next(self) -> Submitted:
        """The next request that comes."""
        return self._asked.get(timeout=LIMIT_S)

    def submit(self, ask: Ask, listener: Listener) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        if self._draining:
            raise ServerStopping("no more")
        submitted = Submitted(ask, listener, Ticket(next(self._numbers)))
        self._live[submitted.ticket] = submitted
        self._asked.put(submitted)
        return submitted.ticket

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.put(ticket)
        self._live.pop(ticket).fail(Cancelled("cancelled"))

    @property
    def longest(self) -> int:
        return 1 << 20

    def background(self, job: Callable[[], Slices[Any]], owner: str = "") -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(drained(job()))
        return future

    def stats(self) -> ServiceStats:
        return ServiceStats()

    def drain(self, timeout_s: float) -> bool:
        self._draining = True
        return not self._live

    def close(self) -> None:
        while self._live:
            self._live.popitem()[1].fail(ServerStopping("stopped"))
