"""What is known of a server's requests: traces, metrics, and the last minutes."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.request import RequestStats
from engine.serve.counters import Read, Readings
from engine.serve.history import History, Latencies, Recorded, Sample
from engine.serve.metrics import Metrics
from engine.service.spans import Recent, Trace


@dataclass(slots=True)
class Sums:
    """Of all requests that ended. Tokens, unless a comment says otherwise."""

    finished: Counter[str] = field(default_factory=Counter)  # requests by tenant
    dropped: int = 0  # clients
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    blends: int = 0  # requests
    exact: int = 0
    reused: int = 0
    fresh: int = 0
    charged: float = 0.0

    def copy(self) -> "Sums":
        return replace(self, finished=self.finished.copy())

    def add(self, tenant: str, stats: RequestStats | None) -> None:
        self.finished[tenant] += 1
        if stats is None:
            return
        self.prompt += stats.prompt_tokens
        self.cached += stats.cached_tokens
        self.generated += stats.new_tokens
        if stats.blend is not None:
            self.blends += 1
            self.exact += stats.blend.exact_tokens
            self.reused += stats.blend.reused_tokens
            self.fresh += stats.blend.fresh_tokens
            self.charged += stats.blend.charged * stats.blend.reused_tokens


class Observed:
    """Takes note of requests as they come and go. Thread-safe.

        trace = observed.begin("POST /v1/completions", request.headers.get("traceparent"))
        ...                                # spans, by whoever does the work
        observed.finished(trace, status=200, tenant="team-a", stats=completion.stats)

    Args:
        model: its name, as clients know it.
        read: counters of the engine's parts; see `engine.serve.counters`.
        clock: seconds, for rates and windows.
    """

    def __init__(self, model: str, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self.model, self.read, self.clock = model, read, clock
        self.started, self.started_unix = clock(), time.time()
        self.recent = Recent()
        self.metrics = Metrics(model, read)
        self.latencies, self.history = Latencies(), History()
        self.sums = Sums()
        self.lock = threading.Lock()  # guards latencies, history and sums
        self.note()

    def begin(self, name: str, traceparent: str | None = None) -> Trace:
        """Call it when a request arrives; `finished` ends the trace."""
        return Trace(name, traceparent)

    def finished(
        self,
        trace: Trace,
        *,
        status: int,
        tenant: str | None = "",
        stats: RequestStats | None = None,
    ) -> None:
        """The last byte was sent, or nobody waits for it any more. `note` may be due.

        Args:
            status: HTTP's; 499 for a client that went.
            tenant: a configured name; "" where there are no keys; None for one that is not known,
                whose trace is not kept.
            stats: of the completion, where there was one.
        """
        name = tenant or ""
        trace.attributes |= {"status": status, "tenant": name}
        if stats is not None:
            trace.attributes |= {
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.cached_tokens,
                "new_tokens": stats.new_tokens,
            }
        trace.end()
        if tenant is not None:
            self.recent.add(trace)
        queue = trace.totals.get("queue")
        queue_s = None if queue is None else queue.busy_ns / 1e9
        ttft_s = stats.ttft_s if stats is not None and stats.new_tokens else None
        self.metrics.observe(trace, status, name, stats, queue_s, tpot_s(stats))
        with self.lock:
            self.sums.add(name, stats)
            self.latencies.note(Recorded(self.clock(), ttft_s, tpot_s(stats), queue_s))

    def dropped(self, reason: Literal["slow", "gone"]) -> None:
        """A client that reads too slowly, or closed its connection, was dropped."""
        self.metrics.dropped(reason)
        with self.lock:
            self.sums.dropped += 1

    def due(self) -> bool:
        """Whether it is time for a `note`."""
        with self.lock:
            return self.history.due(self.clock())

    def note(self) -> None:
        """Keep a reading of the counters, if the last one is some seconds old. May have to wait for
        a step of the engine, as all that reads: not for the server's loop."""
        if self.due():
            readings = self.read()
            with self.lock:
                self.history.note(self.sample(readings))

    def sample(self, readings: Readings) -> Sample:
        """The counters now. The lock must be held."""
        sums = self.sums
        tiers = readings.store.tiers
        return Sample(
            self.clock(),
            sums.prompt,
            sums.cached,
            readings.service.new_tokens,
            {name: tier.hits for name, tier in tiers.items()},
            {name: tier.hits + tier.misses for name, tier in tiers.items()},
        )


def tpot_s(stats: RequestStats | None) -> float | None:
    """Seconds for each token after the first; None where there was one only."""
    if stats is None or stats.new_tokens < 2:
        return None
    return (stats.total_s - stats.ttft_s) / (stats.new_tokens - 1)
