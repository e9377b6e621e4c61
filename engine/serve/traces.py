"""Traces as `/traces` shows them."""

from engine.serve.report import SpanReport, TraceReport
from engine.service.spans import Recent, Shares, Trace


def visible(recent: Recent, tenant: str | None, id_: str | None = None) -> list[Trace]:
    """Newest first: those of a tenant, or of all where it is None; with an id, the ones it names.

    An id may name several: whoever sends `traceparent` gives all its requests one, and the start of
    one is enough. The id that a client was told (`x-request-id`) names a request, too.
    """
    return [
        trace
        for trace in recent.traces()
        if tenant is None or trace.attributes.get("tenant") == tenant
        if id_ is None or trace.id.startswith(id_) or trace.attributes.get("request_id") == id_
    ]


def trace_report(trace: Trace, *, spans: bool = True) -> TraceReport:
    """One trace; its spans may be left out, as lists of traces do."""
    wall = max(trace.wall_ns, 1)
    return TraceReport(
        id=trace.id,
        name=trace.name,
        started_at=trace.start_unix_ns / 1e9,
        wall_s=wall / 1e9,
        coverage=trace.covered_ns / wall,
        shares={name: total.busy_ns / wall for name, total in trace.totals.items()},
        attributes=dict(trace.attributes),
        spans=_spans(trace) if spans else [],
    )


def coverage(shares: Shares) -> float | None:
    """Of the wall time of all traces; None before the first."""
    return shares.covered_ns / shares.wall_ns if shares.wall_ns else None


def share_of(shares: Shares) -> dict[str, float]:
    """Of the same, by name of span."""
    wall = max(shares.wall_ns, 1)
    return {name: total.busy_ns / wall for name, total in shares.totals.items()}


def _spans(trace: Trace) -> list[SpanReport]:
    return [
        SpanReport(
            name=span.name,
            start_s=(span.start_ns - trace.start_ns) / 1e9,
            end_s=(span.end_ns - trace.start_ns) / 1e9,
            busy_s=span.busy_ns / 1e9,
            count=span.count,
        )
        for span in trace.spans
    ]
