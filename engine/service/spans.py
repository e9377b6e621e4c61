"""Where the time of a request goes: a trace of named spans, from its first byte to its last.

Times are `time.perf_counter_ns()`. What each name stands for:

    http         reading the request, checking it and its limits; waiting for a thread to do so
    tokenise     text to token ids, chat templates, choosing chunks
    queue        submitted, and not in a step yet
    lookup       asking the store what it has of the prompt
    load         stored KV on its way to the working set
    prefill      steps with a piece of this prompt, and the pauses between them
    blend        the repair of a prompt of parts
    swap         moving a request's KV down or up, and waiting for it
    decode       steps with this request's newest token, and the pauses between them
    sample       choosing the next token, and freeing what an ended request had
    detokenise   token ids to text, stop strings, the event's way to the server's loop
    send         writing the answer to the socket, and waiting for the reader
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from engine.service.intervals import Intervals

NAMES: Final = (
    "http", "tokenise", "queue", "lookup", "load", "prefill", "blend", "swap", "decode",
    "sample", "detokenise", "send",
)  # fmt: skip
# these go on beside the others and do not end a run of equal spans
ASIDE: Final = frozenset({"http", "sample", "detokenise", "send"})
MAX_SPANS = 128  # of one trace; what comes later joins the last of its name

Attribute = str | int | float | bool


@dataclass(slots=True)
class Span:
    """Work of one name: once, or many times with pauses, as the steps of a decode."""

    name: str
    start_ns: int
    end_ns: int
    busy_ns: int
    count: int = 1


@dataclass(slots=True)
class Total:
    """All spans of one name together."""

    count: int = 0
    busy_ns: int = 0


def parse_traceparent(header: str | None) -> tuple[str, str] | None:
    """(trace id, parent span id) of a W3C `traceparent`; None where there is no valid one."""
    parts = (header or "").strip().split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
        return None
    if any(set(part) - set("0123456789abcdef") for part in parts[:4]):
        return None
    version, trace, parent, _ = parts[:4]
    if version == "ff" or (version == "00" and len(parts) > 4):
        return None
    if not int(trace, 16) or not int(parent, 16):
        return None
    return trace, parent


class Trace:
    """The spans of one request. Every method may be called from any thread.

    Args:
        name: e.g. "POST /v1/chat/completions".
        traceparent: the request's W3C header; a valid one gives the id and the parent.

    Attributes:
        attributes: what is worth knowing of the request. No prompts, keys or secrets: they are
            shown and exported.
    """

    def __init__(self, name: str = "request", traceparent: str | None = None) -> None:
        self.start_ns = time.perf_counter_ns()
        self.start_unix_ns = time.time_ns()
        self.name = name
        parent = parse_traceparent(traceparent)
        self.id = parent[0] if parent else secrets.token_hex(16)
        self.parent_id = parent[1] if parent else None
        self.span_id = secrets.token_hex(8)
        self.attributes: dict[str, Attribute] = {}
        self.end_ns: int | None = None
        self._lock = threading.Lock()
        self._union = Intervals()
        self._spans: list[Span] = []
        self._last: dict[str, tuple[int, Span]] = {}  # by name, with the run it belongs to
        self._run = 0  # counts changes of phase
        self._phase = ""
        self._totals: dict[str, Total] = {}
        self._open: dict[object, tuple[str, int]] = {}

    @contextmanager
    def span(self, name: str) -> Generator[None]:
        """Measures its body. One that is open when the trace ends, ends with it."""
        _check(name)
        entry, start = object(), time.perf_counter_ns()
        with self._lock:
            if self.end_ns is None:
                self._open[entry] = (name, start)
        try:
            yield
        finally:
            end = time.perf_counter_ns()
            with self._lock:
                if self._open.pop(entry, None) is not None:
                    self._add(name, start, end)

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """A span that was measured elsewhere, e.g. a step that several requests share.

        What lies before the trace's start is cut off; nothing is added to one that has ended.
        """
        _check(name)
        with self._lock:
            self._add(name, start_ns, end_ns)

    def end(self) -> None:
        """The last byte was sent. Calling it again changes nothing."""
        with self._lock:
            if self.end_ns is not None:
                return
            end = time.perf_counter_ns()
            for name, start in self._open.values():
                self._add(name, start, end)
            self._open.clear()
            self.end_ns = end

    @property
    def wall_ns(self) -> int:
        """From start to end, or to now."""
        end = self.end_ns
        return (time.perf_counter_ns() if end is None else end) - self.start_ns

    @property
    def covered_ns(self) -> int:
        """Time inside of at least one span that has ended."""
        with self._lock:
            return self._union.covered()

    @property
    def totals(self) -> dict[str, Total]:
        """Count and busy time by name, in the order of `NAMES`."""
        with self._lock:
            found = {n: Total(t.count, t.busy_ns) for n, t in self._totals.items()}
        return {name: found[name] for name in NAMES if name in found}

    @property
    def spans(self) -> list[Span]:
        """In the order in which they began; consecutive ones of a name are one."""
        with self._lock:
            copies = [Span(s.name, s.start_ns, s.end_ns, s.busy_ns, s.count) for s in self._spans]
        return sorted(copies, key=lambda span: span.start_ns)

    def _add(self, name: str, start: int, end: int) -> None:
        start = max(start, self.start_ns)
        if self.end_ns is not None or end < start:
            return
        self._union.add(start, end)
        if self._open and self._union.full:  # those that are open cover all since they began
            since = min(begun for _, begun in self._open.values())
            self._union.add(since, time.perf_counter_ns())
        total = self._totals.setdefault(name, Total())
        total.count += 1
        total.busy_ns += end - start
        self._join(name, start, end)

    def _join(self, name: str, start: int, end: int) -> None:
        """Extend the last span of this name, or begin one if another phase came between."""
        if name not in ASIDE and name != self._phase:
            self._run += 1
            self._phase = name
        run, last = self._last.get(name, (-1, None))
        if last is None or (run != self._run and len(self._spans) < MAX_SPANS):
            last = Span(name, start, end, end - start)
            self._spans.append(last)
        else:
            last.start_ns, last.end_ns = min(last.start_ns, start), max(last.end_ns, end)
            last.busy_ns += end - start
            last.count += 1
        self._last[name] = (self._run, last)


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"no span is called {name!r}: one of {', '.join(NAMES)}")


def span(trace: Trace | None, name: str) -> AbstractContextManager[None]:
    """`trace.span(name)`, or nothing where nobody wants to know."""
    return nullcontext() if trace is None else trace.span(name)


@dataclass(slots=True)
class Shares:
    """Of all traces since the start: how many, and what their time went to."""

    traces: int = 0
    wall_ns: int = 0
    covered_ns: int = 0
    totals: dict[str, Total] = field(default_factory=dict)


class Recent:
    """The last traces that ended, and the sums over all of them. Thread-safe.

    Args:
        capacity: traces of each tenant (their attribute of that name), so that none can push out
            another's.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._lock = threading.Lock()
        self._capacity, self._numbers = capacity, count()
        self._traces: dict[Attribute, deque[tuple[int, Trace]]] = {}  # by tenant; as they came
        self._shares = Shares()

    def traces(self) -> list[Trace]:
        """Newest first."""
        with self._lock:
            numbered = [one for traces in self._traces.values() for one in traces]
        numbered.sort(key=lambda one: one[0], reverse=True)
        return [trace for _, trace in numbered]

    def shares(self) -> Shares:
        """A copy of the sums."""
        with self._lock:
            sums = self._shares
            totals = {n: Total(t.count, t.busy_ns) for n, t in sums.totals.items()}
            return Shares(sums.traces, sums.wall_ns, sums.covered_ns, totals)

    def add(self, trace: Trace) -> None:
        """Remember a trace that has ended."""
        tenant = trace.attributes.get("tenant", "")
        totals, covered = trace.totals, trace.covered_ns
        with self._lock:
            kept = self._traces.setdefault(tenant, deque(maxlen=self._capacity))
            kept.append((next(self._numbers), trace))
            self._shares.traces += 1
            self._shares.wall_ns += trace.wall_ns
            self._shares.covered_ns += covered
            for name, total in totals.items():
                sums = self._shares.totals.setdefault(name, Total())
                sums.count += total.count
                sums.busy_ns += total.busy_ns
