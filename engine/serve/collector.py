"""What the store, the scheduler and the pool count, read when Prometheus asks."""

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.serve import owners
from engine.serve.counters import Read, Readings
from engine.serve.report import Pool
from engine.service.below import SwapStats
from engine.service.stats import ServiceStats
from kvstore.stats import RemoteStats, StoreStats, TierStats

TIER_GAUGES: Final = {
    "used_bytes": ("tier_used_bytes", "Bytes of blocks."),
    "capacity_bytes": ("tier_capacity_bytes", "Bytes it may hold."),
    "blocks": ("tier_blocks", "Blocks it holds."),
    "quarantined": ("tier_quarantined_records", "Damaged records that nobody is given."),
}
TIER_COUNTERS: Final = {
    "hits": ("tier_hits", "Blocks found by a lookup."),
    "misses": ("tier_misses", "Blocks looked for in vain."),
    "reads": ("tier_reads", "Reads answered."),
    "bytes_read": ("tier_read_bytes", "Bytes read."),
    "bytes_written": ("tier_written_bytes", "Bytes written."),
    "evictions": ("tier_evictions", "Blocks evicted."),
    "skipped": ("tier_skipped_blocks", "Blocks not stored: no room, or no parent."),
    "refused": ("tier_refused_blocks", "Blocks not stored: seen once, and the tier was full."),
    "corrupt": ("tier_corrupt_records", "Damaged records found."),
}
GAUGES: Final = {
    "waiting": ("requests_waiting", "Requests that wait for a place."),
    "running": ("requests_running", "Requests that are read or answered."),
    "swapped": ("requests_swapped", "Requests whose KV was moved down."),
    "chores": ("background_work", "Pieces of work beside requests that are not done."),
}
COUNTERS: Final = {
    "steps": ("scheduler_steps", "Steps of the engine."),
    "preemptions": ("scheduler_preemptions", "Requests put back for others."),
    "completed": ("scheduler_completed_requests", "Requests that were answered."),
    "cancelled": ("scheduler_cancelled_requests", "Requests that nobody waited for any more."),
    "failed": ("scheduler_failed_requests", "Requests that failed."),
    "prompt_tokens": ("scheduler_computed_prompt_tokens", "Tokens of prompts computed."),
    "new_tokens": ("scheduler_generated_tokens", "Tokens chosen."),
}
SWAPS: Final = {
    "requests": ("outs", "backs"),
    "copies": ("copies_out", "copies_back"),
    "bytes": ("bytes_out", "bytes_back"),
    "disk_bytes": ("disk_bytes_written", "disk_bytes_read"),
}
REMOTE_GAUGES: Final = {
    "is_open": ("remote_open", "1 while the server is set aside, as it does not answer."),
    "queued_bytes": ("remote_queued_bytes", "Bytes that wait to be sent."),
}
REMOTE_COUNTERS: Final = {
    "openings": ("remote_openings", "Times the server was set aside."),
    "failures": ("remote_failures", "Exchanges that failed."),
    "time_outs": ("remote_timeouts", "Exchanges that took too long."),
}
POOL_GAUGES: Final = {
    "used_bytes": ("pool_used_bytes", "Bytes that running requests have."),
    "capacity_bytes": ("pool_capacity_bytes", "Bytes there are."),
    "open_leases": ("pool_open_leases", "Requests that have some."),
}
POOL_COUNTERS: Final = {
    "hits": ("pool_hits", "Blocks wanted and in memory."),
    "promotions": ("pool_promotions", "Blocks wanted and read from the spill."),
    "evictions": ("pool_evictions", "Blocks made to leave memory."),
    "spilled_bytes": ("pool_spilled_bytes", "Bytes written to the spill."),
    "spill_read_bytes": ("pool_spill_read_bytes", "Bytes read from the spill."),
}


class ReadingsCollector(Collector):
    """Families of the metrics that somebody else counts."""

    def __init__(self, model: str, read: Read) -> None:
        self._model, self._read = model, read

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read."""
        return []

    def collect(self) -> Iterator[Metric]:
        readings = self._read()
        served = GaugeMetricFamily("headrace_model_info", "The model.", labels=["model"])
        served.add_metric([self._model], 1)
        yield served
        yield from _scheduler(readings.service)
        yield from _swap(readings.service.swap)
        yield from _tiers(readings.store.tiers)
        yield from _groups(readings)
        yield _gauge(
            "store_queued_bytes", "On their way to the slowest tier.", readings.store.queued_bytes
        )
        yield from _pins(readings.store)
        if readings.store.remote is not None:
            yield from _remote(readings.store.remote)
        if readings.pool is not None:
            yield from _pool(readings.pool)


def _pins(store: StoreStats) -> Iterator[Metric]:
    yield _gauge("store_pinned_blocks", "That may not be evicted.", store.pinned)
    yield _gauge("store_oldest_pin_seconds", "How long it has held.", store.oldest_pin_s)
    yield _counter("store_expired_pins", "Not released in time.", store.expired_pins)
    starts = CounterMetricFamily(
        "headrace_stored_starts", "Stored starts of prompts, by the faster way.", labels=["way"]
    )
    starts.add_metric(["load"], store.loaded_starts)
    starts.add_metric(["compute"], store.computed_starts)
    yield starts


def _scheduler(now: ServiceStats) -> Iterator[Metric]:
    for field, (name, text) in GAUGES.items():
        yield _gauge(name, text, getattr(now, field))
    for field, (name, text) in COUNTERS.items():
        yield _counter(name, text, getattr(now, field))
    used = GaugeMetricFamily("headrace_kv_used_bytes", "KV of requests.", labels=["place"])
    there = GaugeMetricFamily("headrace_kv_capacity_bytes", "Room for it.", labels=["place"])
    for place in ("device", "lower"):
        used.add_metric([place], getattr(now, f"{place}_bytes"))
        there.add_metric([place], getattr(now, f"{place}_capacity_bytes"))
    yield used
    yield there


def _swap(swap: SwapStats) -> Iterator[Metric]:
    for what, text in {
        "requests": "Requests moved down and back.",
        "copies": "Copies that took.",
        "bytes": "Bytes of KV moved.",
        "disk_bytes": "Bytes of these written to disk and read.",
    }.items():
        counter = CounterMetricFamily(f"headrace_swap_{what}", text, labels=["direction"])
        for direction, field in zip(("out", "back"), SWAPS[what], strict=True):
            counter.add_metric([direction], getattr(swap, field))
        yield counter


def _tiers(tiers: dict[str, TierStats]) -> Iterator[Metric]:
    for field, (name, text) in TIER_GAUGES.items():
        gauge = GaugeMetricFamily(f"headrace_{name}", text, labels=["tier"])
        for tier, stats in tiers.items():
            gauge.add_metric([tier], getattr(stats, field))
        yield gauge
    for field, (name, text) in TIER_COUNTERS.items():
        counter = CounterMetricFamily(f"headrace_{name}", text, labels=["tier"])
        for tier, stats in tiers.items():
            counter.add_metric([tier], getattr(stats, field))
        yield counter


def _remote(remote: RemoteStats) -> Iterator[Metric]:
    for field, (name, text) in REMOTE_GAUGES.items():
        yield _gauge(name, text, getattr(remote, field))
    for field, (name, text) in REMOTE_COUNTERS.items():
        yield _counter(name, text, getattr(remote, field))


def _groups(readings: Readings) -> Iterator[Metric]:
    """Blocks by who has them, how they are written and what they are good for."""
    labels, names = ["tier", "tenant", "codec", "class"], readings.tenants
    nbytes = GaugeMetricFamily("headrace_tier_group_bytes", "Bytes of blocks.", labels=labels)
    blocks = GaugeMetricFamily("headrace_tier_group_blocks", "Blocks.", labels=labels)
    labels = ["tier", "tenant", "class"]
    hits = CounterMetricFamily("headrace_tier_group_hits", "Blocks found.", labels=labels)
    misses = CounterMetricFamily("headrace_tier_group_misses", "Looked for in vain.", labels=labels)
    for tier, stats in readings.store.tiers.items():
        for label, usage in owners.usage(stats.groups, names).items():
            nbytes.add_metric([tier, *label], usage.nbytes)
            blocks.add_metric([tier, *label], usage.blocks)
        for family, numbers in ((hits, stats.hits_of), (misses, stats.misses_of)):
            for label, number in owners.counts(numbers, names).items():
                family.add_metric([tier, *label], number)
    yield from (nbytes, blocks, hits, misses)


def _pool(pool: Pool) -> Iterator[Metric]:
    for field, (name, text) in POOL_GAUGES.items():
        yield _gauge(name, text, getattr(pool, field))
    for field, (name, text) in POOL_COUNTERS.items():
        yield _counter(name, text, getattr(pool, field))


def _gauge(name: str, text: str, value: int | float) -> Metric:
    return GaugeMetricFamily(f"headrace_{name}", text, value=value)


def _counter(name: str, text: str, value: int | float) -> Metric:
    return CounterMetricFamily(f"headrace_{name}", text, value=value)
