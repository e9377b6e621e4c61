"""How a server is doing: the document of `/stats`."""

import msgspec

from engine.serve import owners
from engine.serve.counters import Readings, process_reading
from engine.serve.history import WINDOW_S, Recorded, Sample, quantiles, ratio
from engine.serve.observed import Observed, Sums
from engine.serve.report import (
    Blend,
    Counts,
    Group,
    Latency,
    Running,
    StatusReport,
    Swap,
    Tier,
    Tokens,
)
from engine.serve.traces import coverage, share_of, trace_report, visible
from engine.service.stats import ServiceStats
from kvstore.stats import TierStats

TRACES = 12  # as many as fit on a screen


def status_report(observed: Observed) -> StatusReport:
    """All numbers of now, with the newest traces."""
    observed.note()
    readings, now = observed.read(), observed.clock()
    with observed.lock:
        sums, sample = observed.sums.copy(), observed.sample(readings)
        rate, past = observed.history.generated_per_s(sample), observed.history.past(now)
        recent = observed.latencies.recent(now)
    shares = observed.recent.shares()
    traces = visible(observed.recent, None)[:TRACES]
    return StatusReport(
        model=observed.model,
        started_at=observed.started_unix,
        uptime_s=now - observed.started,
        requests=_counts(readings.service, sums),
        tenants=dict(sums.finished),
        tokens=_tokens(sums, sample, rate),
        latency=_latency(recent),
        tiers=[_tier(name, stats, readings) for name, stats in readings.store.tiers.items()],
        queued_bytes=readings.store.queued_bytes,
        pinned_blocks=readings.store.pinned,
        oldest_pin_s=readings.store.oldest_pin_s,
        expired_pins=readings.store.expired_pins,
        running=msgspec.convert(readings.service, Running, from_attributes=True),
        pool=readings.pool,
        swap=msgspec.convert(readings.service.swap, Swap, from_attributes=True),
        blend=_blend(sums),
        process=process_reading(),
        past=past,
        coverage=coverage(shares),
        shares=share_of(shares),
        traces=[trace_report(trace, spans=False) for trace in traces],
    )


def _counts(now: ServiceStats, sums: Sums) -> Counts:
    return Counts(
        waiting=now.waiting,
        running=now.running,
        swapped=now.swapped,
        finished=sum(sums.finished.values()),
        failed=now.failed,
        cancelled=now.cancelled,
        dropped_clients=sums.dropped,
        preemptions=now.preemptions,
        steps=now.steps,
        background=now.chores,
    )


def _tokens(sums: Sums, sample: Sample, rate: float | None) -> Tokens:
    return Tokens(
        prompt=sums.prompt,
        cached=sums.cached,
        generated=sums.generated,
        cached_ratio=ratio(sums.cached, sums.prompt),
        generated_per_s=rate,
    )


def _latency(recent: list[Recorded]) -> Latency:
    return Latency(
        window_s=WINDOW_S,
        ttft_s=quantiles([request.ttft_s for request in recent]),
        tpot_s=quantiles([request.tpot_s for request in recent]),
        queue_s=quantiles([request.queue_s for request in recent]),
    )


def _tier(name: str, stats: TierStats, readings: Readings) -> Tier:
    groups = owners.usage(stats.groups, readings.tenants)
    return Tier(
        name=name,
        used_bytes=stats.used_bytes,
        capacity_bytes=stats.capacity_bytes,
        blocks=stats.blocks,
        hits=stats.hits,
        misses=stats.misses,
        hit_ratio=ratio(stats.hits, stats.hits + stats.misses),
        read_bytes=stats.bytes_read,
        written_bytes=stats.bytes_written,
        evictions=stats.evictions,
        skipped=stats.skipped,
        refused=stats.refused,
        corrupt=stats.corrupt,
        quarantined=stats.quarantined,
        groups=[
            Group(tenant=tenant, codec=codec, kind=kind, bytes=usage.nbytes, blocks=usage.blocks)
            for (tenant, codec, kind), usage in groups.items()
        ],
    )


def _blend(sums: Sums) -> Blend:
    return Blend(
        requests=sums.blends,
        exact_tokens=sums.exact,
        reused_tokens=sums.reused,
        fresh_tokens=sums.fresh,
        charged_ratio=ratio(sums.charged, sums.reused),
    )
