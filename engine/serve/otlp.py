"""Traces as OpenTelemetry's JSON (OTLP/JSON), as its collectors and viewers read it."""

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from engine.service.spans import Attribute, Span, Trace

SERVER: Final = 2  # SpanKind of what a client asked for
INTERNAL: Final = 1


def otlp(traces: Iterable[Trace]) -> dict[str, Any]:
    """One `ExportTraceServiceRequest`: a span for each request, and below it those it consists of.

    What was measured many times with pauses is one span, whose attributes `busy_ns` and `count`
    tell how much of it was work.
    """
    spans = [span for trace in traces for span in _spans(trace)]
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes({"service.name": "headrace"})},
                "scopeSpans": [{"scope": {"name": "headrace"}, "spans": spans}],
            }
        ]
    }


def _spans(trace: Trace) -> list[dict[str, Any]]:
    end = trace.start_ns + trace.wall_ns
    root = _span(trace, trace.span_id, trace.name, SERVER, (trace.start_ns, end))
    root["attributes"] = _attributes(dict(trace.attributes))
    if trace.parent_id is not None:
        root["parentSpanId"] = trace.parent_id
    return [root, *(_child(trace, number, span) for number, span in enumerate(trace.spans))]


def _child(trace: Trace, number: int, span: Span) -> dict[str, Any]:
    # the same id at every export, so that a collector sees what it has already
    id_ = hashlib.sha256(f"{trace.span_id}/{number}".encode()).hexdigest()[:16]
    child = _span(trace, id_, span.name, INTERNAL, (span.start_ns, span.end_ns))
    child["parentSpanId"] = trace.span_id
    child["attributes"] = _attributes({"busy_ns": span.busy_ns, "count": span.count})
    return child


def _span(trace: Trace, id_: str, name: str, kind: int, at: tuple[int, int]) -> dict[str, Any]:
    start, end = (trace.start_unix_ns + ns - trace.start_ns for ns in at)
    return {
        "traceId": trace.id,
        "spanId": id_,
        "name": name,
        "kind": kind,
        "startTimeUnixNano": str(start),  # 64-bit numbers are strings in protobuf's JSON
        "endTimeUnixNano": str(end),
    }


def _attributes(values: dict[str, Attribute]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Attribute) -> dict[str, Any]:
    if isinstance(value, bool):  # before int, which it is, too
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": value}
