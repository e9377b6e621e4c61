"""`/`, `/stats` and `/traces`: what they tell, and to whom."""

import re
from itertools import count

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from engine.serve.history import History, Sample, quantiles
from engine.serve.observed import Observed
from engine.serve.refusals import Refusal
from engine.serve.report import StatusReport, TracesReport
from engine.serve.status import status_report
from engine.service.spans import NAMES
from kvstore.stats import StoreStats, TierStats
from tests.engine.serve.figures import app, blend, readings, stats, traced

A, B, ALL = ({"authorization": f"Bearer sk-{name}"} for name in ("a", "b", "all"))


def test_stats_tell_what_happened() -> None:
    observed = Observed("needle", readings)
    for _ in range(2):
        observed.finished(traced(observed), status=200, tenant="a", stats=stats(blend=blend()))
    observed.dropped("slow")
    report = status_report(observed)
    assert report.model == "needle"
    assert (report.requests.running, report.requests.waiting, report.requests.swapped) == (12, 4, 2)
    assert (report.requests.finished, report.requests.dropped_clients) == (2, 1)
    assert (report.tokens.prompt, report.tokens.cached, report.tokens.generated) == (
        8192,
        6144,
        102,
    )
    assert report.tokens.cached_ratio == 0.75
    assert report.latency.ttft_s.p50 == 0.25
    assert report.latency.tpot_s.p99 == 0.02
    assert report.latency.queue_s.p90 == (NAMES.index("queue") + 1) / 1000
    host, disk = report.tiers
    assert (host.name, host.used_bytes, host.hit_ratio) == ("host", 3_000_000_001, 0.901)
    assert (disk.corrupt, disk.quarantined) == (3, 1)
    groups = [(group.tenant, group.codec, group.kind, group.bytes) for group in host.groups]
    assert groups == [("team-a", "raw", "exact", 5), ("other", "raw", "chunk", 18)]
    assert (report.queued_bytes, report.pinned_blocks) == (21, 22)
    assert report.pool is not None
    assert report.pool.open_leases == 12
    assert report.blend.charged_ratio == 0.25
    wall_s = sum(trace.wall_s for trace in report.traces)
    assert report.coverage == pytest.approx(2 * 0.078 / wall_s)
    assert sum(report.shares.values()) == pytest.approx(report.coverage)
    assert [trace.attributes["status"] for trace in report.traces] == [200, 200]


def test_a_fresh_server_has_no_ratios() -> None:
    report = status_report(Observed("m", lambda: readings(store=StoreStats({"host": TierStats()}))))
    assert report.tokens.cached_ratio is report.coverage is report.tiers[0].hit_ratio is None
    assert report.latency.ttft_s.p50 is report.tokens.generated_per_s is None


def test_documents_have_the_shape_they_promise() -> None:
    observed = Observed("m", readings)
    observed.finished(traced(observed), status=200, stats=stats())
    client = TestClient(app(observed))
    msgspec.json.decode(client.get("/stats").content, type=StatusReport)
    (trace,) = msgspec.json.decode(client.get("/traces").content, type=TracesReport).traces
    assert trace.name == "POST /v1/chat/completions"
    assert [span.name for span in trace.spans] == list(NAMES)
    assert trace.spans[1].start_s == pytest.approx(trace.spans[0].end_s) == pytest.approx(0.001)


def test_a_trace_is_found_by_its_id_and_by_the_id_of_its_request() -> None:
    observed = Observed("m", readings)
    traces = [traced(observed) for _ in range(3)]
    for number, trace in enumerate(traces):
        trace.attributes["request_id"] = f"req-{number}"
        observed.finished(trace, status=200)
    client = TestClient(app(observed))
    for id_ in (traces[1].id, "req-1"):
        (found,) = client.get("/traces", params={"id": id_}).json()["traces"]
        assert found["id"] == traces[1].id
    assert client.get("/traces", params={"id": "nobody"}).json() == {"traces": []}
    exported = client.get("/traces", params={"id": "req-1", "format": "otlp"}).json()
    spans = exported["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert {span["traceId"] for span in spans} == {traces[1].id}


def test_tenants_see_their_own_requests_only() -> None:
    observed = Observed("m", readings)
    ids = {}
    for tenant in ("team-a", "team-b"):
        trace = traced(observed)
        observed.finished(trace, status=200, tenant=tenant, stats=stats())
        ids[tenant] = trace.id
    client = TestClient(app(observed, keys=True))
    for headers, mine, other in ((A, "team-a", "team-b"), (B, "team-b", "team-a")):
        answer = client.get("/traces", headers=headers)
        assert mine in answer.text
        assert other not in answer.text
        assert ids[other] not in answer.text
        for path in ("/stats", "/metrics"):
            with pytest.raises(Refusal) as refused:
                client.get(path, headers=headers)
            assert refused.value.status == 403
        unknown = client.get("/traces", params={"id": "0" * 32}, headers=headers)
        others = client.get("/traces", params={"id": ids[other]}, headers=headers)
        assert unknown.content == others.content
    for path in ("/stats", "/traces", "/metrics"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=ALL).status_code == 200


def test_the_page_is_for_everybody_and_runs_nothing_but_its_own() -> None:
    answer = TestClient(app(Observed("m", readings), keys=True)).get("/")
    assert answer.status_code == 200
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for source in ("script-src", "style-src"):
        assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", policy[source])
    assert not re.findall(r"(?:src|href)=\"(?!data:)", answer.text)
    assert "innerHTML" not in answer.text
    assert "style=" not in answer.text


def sample(at: float, generated: int, hits: int = 0, lookups: int = 0) -> Sample:
    return Sample(float(at), lookups, hits, generated, {"host": hits}, {"host": lookups})


def test_the_past_is_rates_between_readings() -> None:
    history = History()
    for at, generated, hits, lookups in [(0, 0, 0, 0), (2, 9, 9, 9), (5, 50, 3, 4), (10, 50, 3, 4)]:
        history.note(sample(at, generated, hits, lookups))
    past = history.past(12.0)
    assert past.seconds_ago == [7, 2]
    assert past.generated_per_s == [10, 0]
    assert past.hit_ratio == {"host": [0.75, None]}
    assert past.cached_ratio == [0.75, None]
    assert history.generated_per_s(sample(12, 64)) == 2.0


def test_the_past_ends_after_five_minutes() -> None:
    history = History()
    for at in range(0, 1000, 5):
        history.note(sample(at, at))
    past = history.past(1000.0)
    assert len(past.seconds_ago) == 59
    assert max(past.seconds_ago) <= 300
    assert history.past(5000.0).seconds_ago == []


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_quantiles_are_by_nearest_rank(values: list[float]) -> None:
    found = quantiles([*values, None])
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert value in values
        assert sum(v <= value for v in values) >= share * len(values)
        assert sum(v < value for v in values) < share * len(values)
    assert found.count == len(values)


def test_latencies_are_those_of_the_last_minutes() -> None:
    clock = count(0, 200)
    observed = Observed("m", readings, clock=lambda: float(next(clock)))
    observed.finished(traced(observed), status=200, stats=stats(ttft_s=9.0))
    for _ in range(3):
        observed.note()
    assert status_report(observed).latency.ttft_s.count == 0
