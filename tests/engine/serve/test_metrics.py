"""What Prometheus is told is what happened."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as classic

from engine.serve.observed import Observed
from engine.service.spans import NAMES
from engine.service.stats import ServiceStats
from kvstore.stats import RemoteStats, StoreStats, TierStats
from tests.engine.serve.figures import blend, readings, stats, traced

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def values(observed: Observed) -> Values:
    text, kind = observed.metrics.exposition(None)
    assert kind.startswith("text/plain")
    return {
        (sample.name.removeprefix("headrace_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in classic(text.decode())
        for sample in family.samples
    }


def of(found: Values, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_requests_are_counted_by_tenant_and_status() -> None:
    observed = Observed("m", readings)
    for tenant, status in [("a", 200), ("a", 200), ("b", 200), ("a", 429)]:
        answered = stats() if status == 200 else None
        observed.finished(traced(observed), status=status, tenant=tenant, stats=answered)
    found = values(observed)
    assert of(found, "requests_total", tenant="a", status="200") == 2
    assert of(found, "requests_total", tenant="a", status="429") == 1
    assert of(found, "prompt_tokens_total", tenant="a") == 2 * 4096
    assert of(found, "cached_prompt_tokens_total", tenant="a") == 2 * 3072
    assert of(found, "generated_tokens_total", tenant="b") == 51
    assert of(found, "time_to_first_token_seconds_count") == 3
    assert of(found, "time_to_first_token_seconds_sum") == pytest.approx(0.75)
    assert of(found, "time_per_output_token_seconds_sum") == pytest.approx(3 * 1.0 / 50)
    assert of(found, "time_per_output_token_seconds_bucket", le="0.01") == 0
    assert of(found, "time_per_output_token_seconds_bucket", le="0.025") == 3
    queue_s = (NAMES.index("queue") + 1) / 1000
    assert of(found, "queue_time_seconds_sum") == pytest.approx(4 * queue_s)
    assert of(found, "request_duration_seconds_count") == 4
    assert of(found, "request_duration_seconds_sum") == of(found, "wall_seconds_total")
    assert of(found, "covered_seconds_total") == pytest.approx(4 * 0.078)
    assert of(found, "span_seconds_total", span="decode") == pytest.approx(
        4 * (NAMES.index("decode") + 1) / 1000
    )


def test_one_token_has_no_time_per_output_token_and_none_no_first() -> None:
    observed = Observed("m", readings)
    observed.finished(traced(observed), status=200, stats=stats(new_tokens=1))
    observed.finished(traced(observed), status=499, stats=stats(new_tokens=0))
    found = values(observed)
    assert of(found, "time_per_output_token_seconds_count") == 0
    assert of(found, "time_to_first_token_seconds_count") == 1


def test_counters_of_the_engine_are_read_when_asked_for() -> None:
    found = values(Observed("m", readings))
    assert of(found, "model_info", model="m") == 1
    assert of(found, "requests_waiting") == 4
    assert of(found, "requests_running") == 12
    assert of(found, "requests_swapped") == 2
    assert of(found, "scheduler_preemptions_total") == 6
    assert of(found, "scheduler_generated_tokens_total") == 80_002
    assert of(found, "kv_capacity_bytes", place="lower") == 2_000_000_000
    assert of(found, "swap_copies_total", direction="back") == 13
    assert of(found, "swap_bytes_total", direction="out") == 14_000
    assert of(found, "swap_disk_bytes_total", direction="back") == 20
    assert of(found, "tier_used_bytes", tier="host") == 3_000_000_001
    assert of(found, "tier_hits_total", tier="disk") == 66
    assert of(found, "tier_misses_total", tier="disk") == 33
    assert of(found, "tier_read_bytes_total", tier="host") == 7_000_000_003
    assert of(found, "tier_evictions_total", tier="host") == 17
    assert of(found, "tier_corrupt_records_total", tier="disk") == 3
    assert of(found, "tier_quarantined_records", tier="disk") == 1
    assert of(found, "store_queued_bytes") == 21
    assert of(found, "store_pinned_blocks") == 22
    assert of(found, "store_oldest_pin_seconds") == 1.5
    assert of(found, "store_expired_pins_total") == 0
    assert of(found, "tier_refused_blocks_total", tier="host") == 7
    assert of(found, "pool_promotions_total") == 100
    assert of(found, "pool_spill_read_bytes_total") == 103
    assert of(found, "pool_open_leases") == 12


def test_how_a_shared_tier_answers_is_told_where_there_is_one() -> None:
    assert not any(name.startswith("remote_") for name, _ in values(Observed("m", readings)))
    store = StoreStats({"remote": TierStats(hits=5)}, remote=RemoteStats(True, 1, 2, 3, 4))
    found = values(Observed("m", lambda: readings(store=store)))
    assert of(found, "tier_hits_total", tier="remote") == 5
    assert of(found, "remote_open") == 1
    assert of(found, "remote_openings_total") == 1
    assert of(found, "remote_failures_total") == 2
    assert of(found, "remote_timeouts_total") == 3
    assert of(found, "remote_queued_bytes") == 4


def test_blocks_are_told_by_configured_tenants_and_all_others_as_one() -> None:
    found, host = values(Observed("m", readings)), {"tier": "host"}
    ours = host | {"tenant": "team-a", "class": "exact"}
    others = host | {"tenant": "other", "class": "chunk"}
    assert of(found, "tier_group_bytes", codec="raw", **ours) == 5
    assert of(found, "tier_group_blocks", codec="raw", **ours) == 3
    assert of(found, "tier_group_bytes", codec="raw", **others) == 18
    assert of(found, "tier_group_hits_total", **ours) == 13
    assert of(found, "tier_group_hits_total", **others) == 1
    assert of(found, "tier_group_misses_total", **(others | {"class": "exact"})) == 17
    assert sum(name == "tier_group_bytes" for name, _ in found) == 2


def test_a_server_without_a_pool_tells_of_none() -> None:
    names = {name for name, _ in values(Observed("m", lambda: readings(pool=None)))}
    assert not any(name.startswith("pool_") for name in names)


def test_every_scrape_reads_anew() -> None:
    running = iter(range(100))
    observed = Observed("m", lambda: readings(service=ServiceStats(running=next(running))))
    first, second = (of(values(observed), "requests_running") for _ in range(2))
    assert second == first + 1


def test_blends_are_counted_by_what_was_done() -> None:
    observed = Observed("m", readings)
    observed.finished(traced(observed), status=200, stats=stats(blend=blend()))
    found = values(observed)
    assert of(found, "blend_requests_total", decision="loaded") == 1
    tokens = {
        kind: of(found, "blend_tokens_total", kind=kind)
        for kind in ("exact", "reused", "repaired", "fresh", "charged")
    }
    assert tokens == {"exact": 300, "reused": 600, "repaired": 7, "fresh": 100, "charged": 150}
    assert of(found, "blend_chunks_total", outcome="found") == 3
    assert of(found, "blend_charged_ratio_sum") == 0.25


def test_dropped_clients_are_there_before_the_first_one() -> None:
    observed = Observed("m", readings)
    assert of(values(observed), "dropped_clients_total", reason="slow") == 0
    observed.dropped("gone")
    assert of(values(observed), "dropped_clients_total", reason="gone") == 1


def test_openmetrics_is_spoken_where_it_is_asked_for() -> None:
    observed = Observed("m", readings)
    observed.finished(traced(observed), status=200, tenant="a", stats=stats(blend=blend()))
    text, kind = observed.metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics(text.decode())}
    assert {
        "headrace_requests",
        "headrace_tier_hits",
        "headrace_time_to_first_token_seconds",
    } <= names


def test_names_end_in_their_units() -> None:
    """As https://prometheus.io/docs/practices/naming/ has it."""
    for family in classic(Observed("m", readings).metrics.exposition(None)[0].decode()):
        if family.name.startswith("headrace_"):
            totals = {sample.name.endswith("_total") for sample in family.samples}
            assert totals <= {family.type == "counter"}, family.name
            for word, unit in (("time", "seconds"), ("size", "bytes")):
                assert word not in family.name.split("_") or unit in family.name
            assert family.documentation.endswith(".")
