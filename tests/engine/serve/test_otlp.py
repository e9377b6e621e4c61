"""Traces as OpenTelemetry reads them: its own parser is the judge."""

import base64
import json
from typing import Any

from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from engine.serve.otlp import otlp
from engine.service.spans import Trace

ID, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def parsed(document: dict[str, Any]) -> list[ProtoSpan]:
    """OTLP/JSON differs from protobuf's own JSON in one thing: ids are hex, not base64."""

    def hexed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        ids = {"traceId", "spanId", "parentSpanId"}
        return {k: base64.b64encode(bytes.fromhex(v)).decode() if k in ids else v for k, v in pairs}

    text = json.dumps(json.loads(json.dumps(document), object_pairs_hook=hexed))
    (resource,) = Parse(text, ExportTraceServiceRequest()).resource_spans
    assert resource.resource.attributes[0].key == "service.name"
    (scope,) = resource.scope_spans
    return list(scope.spans)


def test_opentelemetry_reads_what_was_measured() -> None:
    trace = Trace("POST /v1/completions", f"00-{ID}-{PARENT}-01")
    trace.attributes |= {"tokens": 2**40, "share": 0.5, "stream": True, "model": "é"}
    for name, start, end in [("http", 0, 10), ("decode", 10, 20), ("decode", 30, 50)]:
        trace.add(name, trace.start_ns + start, trace.start_ns + end)
    trace.end()
    root, http, decode = parsed(otlp([trace]))
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (ID, PARENT)
    assert root.span_id.hex() == trace.span_id
    assert (root.name, root.kind) == ("POST /v1/completions", ProtoSpan.SPAN_KIND_SERVER)
    assert root.start_time_unix_nano == trace.start_unix_ns
    assert root.end_time_unix_nano - root.start_time_unix_nano == trace.wall_ns
    values = {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in root.attributes}
    assert values == trace.attributes
    assert type(values["stream"]) is bool
    assert http.parent_span_id == decode.parent_span_id == root.span_id
    assert decode.start_time_unix_nano == trace.start_unix_ns + 10
    assert decode.end_time_unix_nano == trace.start_unix_ns + 50
    assert {a.key: a.value.int_value for a in decode.attributes} == {"busy_ns": 30, "count": 2}
    assert len({root.span_id, http.span_id, decode.span_id}) == 3


def test_an_export_repeats_its_ids() -> None:
    trace = Trace()
    trace.add("decode", trace.start_ns, trace.start_ns + 1)
    trace.end()
    assert otlp([trace]) == otlp([trace])
    assert not parsed(otlp([trace]))[0].parent_span_id


def test_no_traces_are_an_empty_document() -> None:
    assert parsed(otlp([])) == []
