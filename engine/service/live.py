"""A request in a service, from its submission to its last event."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from engine.engine import Engine
from engine.loading import Loader
from engine.request import Running
from engine.service.ask import Ask, Listener, Ticket
from engine.service.job import Job
from engine.slices import Slices
from kvstore.block import BlockKey


@runtime_checkable
class Coming(Protocol):
    """Something on its way, as `concurrent.futures.Future`."""

    def done(self) -> bool: ...
    def result(self) -> Any: ...
    def add_done_callback(self, call: Callable[[Any], object], /) -> None: ...


class Live:
    """What the engine thread knows of a request.

    All but `ended_by` and `quiet`, which say what others want, is that thread's alone.

    Args:
        engine: the view of the engine whose KV the request may use.
    """

    def __init__(
        self, ticket: Ticket, ask: Ask, engine: Engine, run: Running, job: Job, listener: Listener
    ) -> None:
        self.ticket, self.ask, self.engine = ticket, ask, engine
        self.run, self.job, self.listener = run, job, listener
        self.ended_by: Exception | None = None  # set by whoever wants it to end
        self.quiet = False  # the outbox has told its end
        self.deadline = None if ask.deadline_s is None else time.monotonic() + ask.deadline_s
        self.loader: Loader | None = None
        self.coming: Coming | None = None  # what it waits for: that load, or KV moved back
        self.usable: Sequence[BlockKey] = ()  # blocks that may stand in for its prompt's start
        self.found: Sequence[BlockKey] = ()  # of these, what is stored
        self.waits = False  # until these are loaded
        self.attempts = 0  # to load
        self.work: Slices[Float[Tensor, " vocab"]] | None = None  # of a prompt of parts
        self.credit = 0  # tokens of that work that it was granted, less those it took
        self.settling: Iterator[None] | None = None  # indexes that are built
        self.logits: Float[Tensor, " vocab"] | None = None  # after the prompt, meanwhile
        self.pins = ExitStack()
        self._since_ns = time.perf_counter_ns()

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def mark(self, name: str) -> None:
        """Note where the time since the last mark went, where anybody wants to know."""
        now = time.perf_counter_ns()
        if self.ask.trace is not None:
            self.ask.trace.add(name, self._since_ns, now)
        self._since_ns = now

    def loaded(self) -> None:
        """Its stored KV is in the cache: what kept it in the store may go."""
        if self.loader is not None:
            self.loader.cancel()
            self.loader = None
        self.pins.close()

    def release(self) -> None:
        """Free all that it holds. Idempotent; nothing works for it any more afterwards."""
        with ExitStack() as parts:  # each, whatever becomes of the others
            parts.callback(self.run.release)
            if self.work is not None:
                parts.callback(self.work.close)
            parts.callback(self.loaded)
        self.work = self.settling = self.logits = self.coming = None
