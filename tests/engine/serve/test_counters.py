"""The counters of a real server are those of its parts, and of what its clients were told."""

from prometheus_client.parser import text_string_to_metric_families

from engine.serve.counters import pool_reading, process_reading
from kvstore.config import StoreConfig
from kvstore.pool.pool import Pool
from kvstore.store import TieredStore
from tests.engine.serve.server import running
from tests.kvstore.make import chain, items
from tests.kvstore.pool.test_pool import shaped

PROMPT = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 12


def test_a_server_counts_what_its_clients_were_told() -> None:
    with running() as server, server.client() as client, server.http() as http:
        usages = []
        for _ in range(2):
            answer = client.completions.create(model=server.model, prompt=PROMPT, max_tokens=9)
            assert answer.usage is not None
            usages.append(answer.usage)
        client.models.list()  # makes no work, and is not counted
        report, store = http.get("/stats").json(), server.engine.stats()
        text = http.get("/metrics").text
    prompt, generated = (
        sum(u.prompt_tokens for u in usages),
        sum(u.completion_tokens for u in usages),
    )
    details = usages[1].prompt_tokens_details
    assert details is not None
    cached = details.cached_tokens
    assert cached
    assert report["tokens"]["prompt"] == prompt
    assert report["tokens"]["cached"] == cached
    assert report["tokens"]["generated"] == generated
    assert report["requests"]["finished"] == 2
    assert report["requests"]["running"] == report["requests"]["waiting"] == 0
    assert report["requests"]["steps"] >= generated
    assert report["running"]["device_bytes"] == report["pinned_blocks"] == 0
    assert report["running"]["device_capacity_bytes"] > 0
    (tier,) = report["tiers"]
    host = store.tiers["host"]
    assert (tier["used_bytes"], tier["hits"], tier["blocks"]) == (
        host.used_bytes, host.hits, host.blocks,
    )  # fmt: skip
    assert tier["hits"] > 0
    found = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["headrace_requests_total", "200", ""] == 2
    assert found["headrace_prompt_tokens_total", ""] == prompt
    assert found["headrace_cached_prompt_tokens_total", ""] == cached
    assert found["headrace_generated_tokens_total", ""] == generated
    assert found["headrace_time_to_first_token_seconds_count",] == 2
    assert found["headrace_tier_hits_total", "host"] == host.hits
    assert found["headrace_tier_written_bytes_total", "host"] == host.bytes_written
    assert found["headrace_model_info", server.model] == 1


def test_a_pool_tells_who_has_some_of_it() -> None:
    pool = Pool(shape := shaped(), 8 * shape.block_bytes)
    assert pool_reading(pool).open_leases == pool_reading(pool).used_bytes == 0
    with pool.lease() as lease:
        lease.reserve(2 * shape.block_tokens)
        reading = pool_reading(pool)
        assert (reading.open_leases, reading.used_bytes) == (1, 2 * shape.block_bytes)
        assert reading.capacity_bytes == 8 * shape.block_bytes
    assert pool_reading(pool).open_leases == 0
    pool.close()


def test_a_store_tells_how_many_blocks_are_pinned() -> None:
    keys = chain(range(64))
    with TieredStore.open(StoreConfig(host_bytes=1 << 20)) as store:
        store.put(items(keys))
        with store.pin(keys), store.pin(keys[:1]):
            assert store.stats().pinned == len(keys)
        assert store.stats().pinned == 0


def test_the_process_is_told_apart_from_others() -> None:
    before = process_reading()
    with open("/dev/null") as _:
        after = process_reading()
    assert before.open_files is not None
    assert after.open_files == before.open_files + 1
    assert before.rss_bytes is not None
    assert 1 << 20 < before.rss_bytes < 1 << 40
