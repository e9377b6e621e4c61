"""The numbers of `/metrics`, as Prometheus reads them."""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.blend.repair import BlendReport
from engine.request import RequestStats
from engine.serve.collector import ReadingsCollector
from engine.serve.counters import Read
from engine.service.spans import NAMES, Trace

SECONDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
PER_TOKEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TOKENS: Final = tuple(4.0**n for n in range(2, 11))  # 16 to 1,048,576
RATIO: Final = tuple(n / 10 for n in range(11))
DROPPED: Final = ("slow", "gone")  # reads too slowly; closed its connection


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, model: str, read: Read) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(ReadingsCollector(model, read))
        ProcessCollector(registry=self.registry)
        self._requests = self._counter(
            "requests", "Requests that ended, by HTTP status (499: the client went).",
            "tenant", "status",
        )  # fmt: skip
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.", "tenant")
        self._cached = self._counter(
            "cached_prompt_tokens", "Tokens of prompts whose KV came from the store.", "tenant"
        )
        self._generated = self._counter("generated_tokens", "Tokens of answers.", "tenant")
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", SECONDS
        )
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Of the tokens after the first, on average.", PER_TOKEN
        )
        self._queue = self._histogram(
            "queue_time_seconds", "From submission to the first step.", SECONDS
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From the first byte read to the last one sent.", SECONDS
        )
        self._lengths = self._histogram("prompt_length_tokens", "Tokens of a prompt.", TOKENS)
        self._dropped = self._counter("dropped_clients", "Clients that were dropped.", "reason")
        self._spans = self._counter("span_seconds", "Time of requests by what it was for.", "span")
        self._covered = self._counter("covered_seconds", "Time of requests inside of a span.")
        self._wall = self._counter("wall_seconds", "Time of requests.")
        self._init_blend()
        for reason in DROPPED:  # so that a rate can be told from the first one on
            self._dropped.labels(reason)
        for name in NAMES:
            self._spans.labels(name)

    def _init_blend(self) -> None:
        self._blends = self._counter(
            "blend_requests",
            "Prompts of parts, by whether stored KV of chunks was used.",
            "decision",
        )
        self._blend_tokens = self._counter(
            "blend_tokens", "Tokens of prompts of parts: exact, reused (charged of them), fresh.",
            "kind",
        )  # fmt: skip
        self._blend_chunks = self._counter(
            "blend_chunks", "Chunks of prompts: found, not stored, damaged.", "outcome"
        )
        self._blend_charged = self._histogram(
            "blend_charged_ratio", "Share of reused tokens that was computed afresh.", RATIO
        )

    def observe(
        self,
        trace: Trace,
        status: int,
        tenant: str,
        stats: RequestStats | None,
        queue_s: float | None,
        tpot_s: float | None,
    ) -> None:
        """Count a request that ended; its trace has, too."""
        self._requests.labels(tenant, str(status)).inc()
        self._duration.observe(trace.wall_ns / 1e9)
        self._wall.inc(trace.wall_ns / 1e9)
        self._covered.inc(trace.covered_ns / 1e9)
        for name, total in trace.totals.items():
            self._spans.labels(name).inc(total.busy_ns / 1e9)
        if queue_s is not None:
            self._queue.observe(queue_s)
        if stats is None:
            return
        self._prompt.labels(tenant).inc(stats.prompt_tokens)
        self._cached.labels(tenant).inc(stats.cached_tokens)
        self._generated.labels(tenant).inc(stats.new_tokens)
        self._lengths.observe(stats.prompt_tokens)
        if stats.new_tokens:
            self._ttft.observe(stats.ttft_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
        if stats.blend is not None:
            self._observe_blend(stats.blend)

    def dropped(self, reason: str) -> None:
        """A client was dropped: "slow" or "gone"."""
        self._dropped.labels(reason).inc()

    def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """The text and its content type: OpenMetrics where the request's `accept` asks for it."""
        encode, content_type = choose_encoder(accept or "")
        return encode(_View(self.registry)), content_type

    def _observe_blend(self, blend: BlendReport) -> None:
        self._blends.labels("loaded" if blend.loaded else "computed").inc()
        for kind in ("exact", "reused", "repaired", "fresh"):
            self._blend_tokens.labels(kind).inc(getattr(blend, f"{kind}_tokens"))
        self._blend_tokens.labels("charged").inc(blend.charged * blend.reused_tokens)
        self._blend_chunks.labels("missed").inc(blend.missed)
        self._blend_chunks.labels("corrupt").inc(blend.corrupt)
        found = blend.chunks - blend.missed - blend.corrupt
        self._blend_chunks.labels("found").inc(max(0, found))
        if blend.reused_tokens:
            self._blend_charged.observe(blend.charged)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"headrace_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"headrace_{name}", text, buckets=buckets, registry=self.registry)


class _View(Collector):
    """A registry without creation times."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            view = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            view.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield view
