"""What two stores share through a server, and what they do not."""

import dataclasses
import threading
import time

import pytest
import torch
from redis.crc import key_slot

from kvstore import layout
from kvstore.codecs.known import BY_NAME
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError, Unreachable
from kvstore.quotas import Quotas
from kvstore.remote.tier import RemoteTier
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items, right, same
from tests.kvstore.remote.server import SECRET
from tests.kvstore.remote.tls import door

KEYS = chain(range(40))  # 10 blocks
BYTES = content(KEYS[0], identity()).nbytes
MODEL = identity()
WAIT_S = 20.0


def opened(server, *, host=100, secret=SECRET, **settings):
    remote = RemoteTier(server.config(**settings), secret=secret)
    return TieredStore([HostTier(host * BYTES)], remote=remote)


def remote_of(store):
    return store._remote


def shared(server, keys=KEYS, **settings):
    """Put blocks with a store of its own, and wait until they are sent."""
    with opened(server, **settings) as store:
        store.put(items(keys))
        assert remote_of(store).drain(WAIT_S)


def rows_for(count, layers):
    return torch.zeros(count, len(layers), *MODEL.block_shape(4)[1:], dtype=MODEL.torch_dtype)


def test_another_store_reads_what_one_has_put(server):
    shared(server)
    with opened(server) as store:
        assert store.lookup(KEYS) == 10
        assert all(right(store.get(key), key) for key in KEYS)
        tier = store.stats().tiers["remote"]
        assert (tier.hits, tier.misses, tier.reads, tier.corrupt) == (10, 0, 10, 0)


@pytest.mark.parametrize("host", [1, 4, 100])
def test_many_reads_land_in_rows_and_what_fits_stays_in_memory(server, host):
    shared(server)
    with opened(server, host=host) as store:
        wanted = torch.stack([content(key, MODEL)[1:3] for key in KEYS])
        out = torch.zeros_like(wanted)
        with store.pin(KEYS):
            assert store.read_many(KEYS, range(1, 3), out) == [True] * 10
            assert same(out, wanted)
            kept = store.resting(KEYS)
            assert kept.count("host") == min(host, 10)
            out.zero_()
            assert store.read_many(KEYS, range(1, 3), out) == [True] * 10
            assert same(out, wanted)
        assert store.stats().tiers["host"].reads >= min(host, 10)


def test_a_block_asked_for_twice_is_right_in_both_rows(server):
    shared(server)
    for host in (1, 100):
        with opened(server, host=host) as store:
            keys = [KEYS[1], KEYS[0], KEYS[1], KEYS[2], KEYS[1]]
            out = rows_for(5, range(3))
            assert store.read_many(keys, range(3), out) == [True] * 5
            assert all(same(row, content(key, MODEL)) for key, row in zip(keys, out, strict=True))


def test_a_lookup_asks_once_for_256_blocks_and_only_for_what_is_not_here(server):
    keys = chain(range(4 * 600))
    shared(server, keys[:520], host=600)
    with opened(server, host=600) as store, server.client() as client:
        store.put(items(keys[:100]))
        assert remote_of(store).drain(WAIT_S)
        before = client.info("commandstats")["cmdstat_exists"]["calls"]
        assert store.lookup(keys) == 520
        asked = client.info("commandstats")["cmdstat_exists"]["calls"] - before
        assert asked == 600 - 100
        tier = store.stats().tiers["remote"]
        assert (tier.hits, tier.misses) == (420, 1)
        assert store.lookup(keys[:100]) == 100
        assert client.info("commandstats")["cmdstat_exists"]["calls"] == before + asked


def test_a_lookup_believes_what_was_asked_before_and_asks_for_what_was_not(server):
    keys = chain(range(4 * 600))
    shared(server, keys[:520], host=600)
    with opened(server, host=600) as store, server.client() as client:

        def asked() -> int:
            return client.info("commandstats")["cmdstat_exists"]["calls"]

        store.put(items(keys[:100]))
        assert remote_of(store).drain(WAIT_S)
        known = store.shared(keys)
        assert [known.get(key.digest) for key in keys] == [None] * 100 + [True] * 420 + [False] * 80
        before = asked()
        assert store.lookup(keys, known) == 520
        assert asked() == before
        del known[keys[200].digest]
        assert store.lookup(keys, known) == 520
        assert asked() == before + 1
        known[keys[200].digest] = False
        assert store.lookup(keys, known) == 200
        store.put(items(keys[100:201]))  # it is here by now
        assert store.lookup(keys, known) == 520
    with opened(server) as store:
        assert store.shared([]) == {}


def test_one_of_several_threads_fetches_a_block_for_all(server):
    shared(server)
    with opened(server) as store, server.client() as client:
        asked = client.info("commandstats")["cmdstat_getrange"]["calls"]
        outs = [rows_for(10, range(3)) for _ in range(6)]
        threads = [
            threading.Thread(target=store.read_many, args=(KEYS, range(3), out)) for out in outs
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        wanted = torch.stack([content(key, MODEL) for key in KEYS])
        assert all(same(out, wanted) for out in outs)
        asked = client.info("commandstats")["cmdstat_getrange"]["calls"] - asked
        assert asked == 2 * 10  # an index and a record each


def test_what_came_from_a_server_is_on_disk_afterwards(server, tmp_path):
    shared(server)
    disk = DiskTier(tmp_path, 1 << 20)
    remote = RemoteTier(server.config(), secret=SECRET)
    with TieredStore([HostTier(100 * BYTES), disk], remote=remote) as store:
        assert store.read_many(KEYS, range(1), rows_for(10, range(1))) == [True] * 10
        store.flush()
        assert disk.held(KEYS) == [True] * 10


def test_a_store_without_memory_reads_only_the_layers_that_are_needed(server, tmp_path):
    model = identity(num_layers=6, num_kv_heads=16, head_dim=2048)  # a record holds four layers
    keys = chain(range(8), model=model)
    with TieredStore(
        [HostTier(1 << 30)], remote=RemoteTier(server.config(), secret=SECRET)
    ) as store:
        store.put(items(keys, model))
        assert remote_of(store).drain(WAIT_S)
    disk = DiskTier(tmp_path, 1 << 30)
    remote = RemoteTier(server.config(), secret=SECRET)
    with TieredStore([disk], remote=remote) as store, server.client() as client:
        before = client.info("commandstats").get("cmdstat_getrange", {"calls": 0})["calls"]
        out = torch.zeros(2, 2, *model.block_shape(4)[1:], dtype=model.torch_dtype)
        assert store.read_many(keys, range(3, 5), out) == [True] * 2
        assert all(same(row, content(key, model)[3:5]) for key, row in zip(keys, out, strict=True))
        asked = client.info("commandstats")["cmdstat_getrange"]["calls"] - before
        assert asked == 2 * (1 + 2)
        assert same(store.read(keys[0], range(5, 6)), content(keys[0], model)[5:6])
        with pytest.raises(ValueError, match="run of the 6 layers"):
            store.read_many(keys, range(7, 9), out)
        with pytest.raises(ValueError, match="out must be contiguous"):
            store.read_many(keys, range(0, 1), out)


def test_values_are_small_expire_and_share_a_slot_with_their_index(server):
    model = identity(num_layers=6, num_kv_heads=16, head_dim=2048)
    key = chain(range(4), model=model)[0]
    with TieredStore(
        [HostTier(1 << 30)], remote=RemoteTier(server.config(ttl_s=300), secret=SECRET)
    ) as store:
        store.put(items([key], model))
        assert remote_of(store).drain(WAIT_S)
    with server.client() as client:
        names = client.keys()
        assert len(names) == 1 + 2
        assert all(b"{%s}" % key.digest.hex().encode() in name for name in names)
        assert len({key_slot(name) for name in names}) == 1
        assert all(200 < client.ttl(name) <= 300 for name in names)
        assert max(client.strlen(name) for name in names) < 4 << 20


def test_a_block_in_too_large_values_is_left_out_and_counted(server):
    model = identity(num_layers=1, num_kv_heads=64, head_dim=8192)
    key = chain(range(4), model=model)[0]
    with TieredStore(
        [HostTier(1 << 30)], remote=RemoteTier(server.config(), secret=SECRET)
    ) as store:
        store.put(items([key], model))
        assert store.stats().tiers["remote"].skipped == 1
        assert remote_of(store).drain(WAIT_S)
    with server.client() as client:
        assert client.dbsize() == 0


def test_a_key_that_was_read_back_from_a_disk_is_not_shared(server):
    key = dataclasses.replace(KEYS[0], seal_key=b"")
    shared(server, [key])
    with server.client() as client:
        assert client.dbsize() == 0
    shared(server)
    with opened(server) as store:
        assert store.get(key) is None


def test_blocks_that_are_there_are_not_sent_again(server):
    shared(server)
    with server.client() as client:
        before = client.info("commandstats")["cmdstat_set"]["calls"]
        shared(server)
        assert client.info("commandstats")["cmdstat_set"]["calls"] == before


def test_a_deleted_block_is_gone_with_all_its_values(server):
    shared(server)
    with opened(server) as store, server.client() as client:
        there = client.dbsize()
        assert store.delete([KEYS[0], KEYS[3].digest, chain(range(900, 904))[0]]) == 2
        assert client.dbsize() == there - 4
        assert store.lookup(KEYS) == 0
        assert store.lookup(KEYS[1:]) == 2


def test_a_deleted_block_leaves_no_records_that_the_server_lost_the_index_of(server):
    shared(server)
    with opened(server) as store, server.client() as client:
        client.delete(*[name for name in client.scan_iter() if name.endswith(b"}")])
        assert client.dbsize() == len(KEYS)
        client.config_resetstat()
        assert store.delete(KEYS) == 0
        assert client.dbsize() == 0
        assert client.info("commandstats")["cmdstat_unlink"]["calls"] == len(KEYS)


def test_so_many_records_go_as_a_large_model_has_layers(server, monkeypatch):
    monkeypatch.setattr(layout, "TARGET_BYTES", 1)  # a record for each of them
    large = identity(num_layers=126)
    (key,) = chain(range(4), model=large)
    with opened(server) as store, server.client() as client:
        store.put(items([key], large))
        assert remote_of(store).drain(WAIT_S)
        assert client.dbsize() == 127
        client.delete(*[name for name in client.scan_iter() if name.endswith(b"}")])
        store.delete([key])
        assert client.dbsize() == 0


def test_what_rests_on_a_deleted_block_goes_as_far_as_it_is_known_here(server):
    with opened(server) as store, server.client() as client:
        store.put(items(KEYS))
        assert remote_of(store).drain(WAIT_S)
        assert store.delete([KEYS[2], KEYS[2]]) == 2  # here, and there
        assert store.resting(KEYS) == ["host"] * 2 + [None] * 8
        assert client.dbsize() == 2 * 2


def test_a_server_that_is_full_takes_no_blocks_and_gives_those_it_has(server, caplog):
    shared(server)
    with opened(server) as store, server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        try:
            more = chain(range(100, 108))
            store.put(items(more))
            assert remote_of(store).drain(WAIT_S)
            assert store.lookup(KEYS) == 10
            assert store.stats().tiers["remote"].skipped == 2
            assert "takes no blocks: OOM" in caplog.text
        finally:
            client.config_set("maxmemory", 0)
        assert not store.stats().remote.is_open


def test_a_block_that_lost_a_record_is_a_miss_until_it_is_written_again(server):
    shared(server)
    with opened(server) as store, server.client() as client:
        record = next(
            n for n in client.scan_iter() if KEYS[4].digest.hex().encode() in n and n[-2:] == b":0"
        )
        client.delete(record)
        assert store.lookup(KEYS) == 10
        assert [store.get(key) is not None for key in KEYS] == [i != 4 for i in range(10)]
        assert store.lookup(KEYS[4:]) == 0
        assert remote_of(store).drain(WAIT_S)  # which deletes the rest of it
        tier = store.stats().tiers["remote"]
        assert (tier.corrupt, tier.quarantined) == (0, 0)
        store.put(items(KEYS[4:5]))
        assert remote_of(store).drain(WAIT_S)
    with opened(server) as store:
        assert store.lookup(KEYS) == 10
        assert right(store.get(KEYS[4]), KEYS[4])


@pytest.mark.parametrize("codec", BY_NAME.values(), ids=BY_NAME)
def test_blocks_of_every_codec_are_shared(server, codec):
    with TieredStore(
        [HostTier(100 * BYTES)], remote=RemoteTier(server.config(), codec, secret=SECRET)
    ) as store:
        store.put(items(KEYS))
        assert remote_of(store).drain(WAIT_S)
    with opened(server, host=1) as store:
        assert store.lookup(KEYS) == 10
        assert all(right(store.get(key), key) for key in KEYS)


def test_a_server_behind_tls_is_trusted_by_its_certificate_only(server, tmp_path):
    pem = tmp_path / "ours.pem"
    with door(server.path, pem) as port:
        url = f"rediss://localhost:{port}"
        shared(server, url=url, ca_file=str(pem))
        with opened(server) as store:
            assert store.lookup(KEYS) == 10
        with opened(server, url=url, ca_file=str(pem)) as store:
            assert all(right(store.get(key), key) for key in KEYS)
        with opened(server, url=url) as store:
            assert store.stats().remote.is_open
            assert store.lookup(KEYS) == 0
    with pytest.raises(StoreError, match=r"cannot read remote\.ca_file"):
        opened(server, url=url, ca_file=str(tmp_path / "none.pem"))


def test_blocks_of_a_server_are_promoted_as_far_as_there_is_room(server):
    shared(server)
    for host in (4, 100):
        with opened(server, host=host) as store:
            assert store.promote(KEYS) == min(host, 10)
            assert store.resting(KEYS).count("host") == min(host, 10)


def test_a_closed_store_sent_what_waited(server):
    store = opened(server)
    store.put(items(KEYS))
    store.close()
    with opened(server) as other:
        assert other.lookup(KEYS) == 10


def test_what_is_read_in_inference_mode_may_be_used_outside_it(server):
    shared(server)
    with opened(server) as store:
        with torch.inference_mode():
            block = store.get(KEYS[0])
        assert not block.data.is_inference()


def test_a_reader_does_not_bring_back_what_is_deleted(server, monkeypatch):
    shared(server)
    with opened(server) as store:
        store.put(items(KEYS))
        remote = remote_of(store)
        delete = remote.delete

        def deleted(keys):
            for key in KEYS:  # meanwhile, somebody reads
                store.get(key)
            return delete(keys)

        monkeypatch.setattr(remote, "delete", deleted)
        store.delete(KEYS)
        assert store.resting(KEYS) == [None] * len(KEYS)


def test_a_server_that_cannot_be_asked_keeps_nothing_here(server, monkeypatch):
    with opened(server) as store:
        store.put(items(KEYS))

        def gone(_):
            raise Unreachable("gone")

        monkeypatch.setattr(remote_of(store), "delete", gone)
        with pytest.raises(Unreachable):
            store.delete(KEYS)
        assert not any(key in store for key in KEYS)


def test_a_user_of_the_namespace_alone_is_enough(server):
    with server.client() as client:
        client.acl_setuser(
            "team", enabled=True, passwords=["+word"], keys=["team-a:*"], commands=["+@all"]
        )
    url = f"unix://team:word@{server.path}"
    try:
        shared(server, namespace="team-a", url=url)
        with opened(server, namespace="team-a", url=url) as store:
            assert store.lookup(KEYS) == 10
    finally:
        with server.client() as client:
            client.acl_deluser("team")


def test_what_is_on_its_way_from_the_server_does_not_outlive_its_deletion(server, tmp_path):
    shared(server)
    remote = RemoteTier(server.config(), secret=SECRET)
    tiers = [HostTier(100 * BYTES), DiskTier(tmp_path / "store", 1 << 30)]
    with TieredStore(tiers, remote=remote) as store:
        came, goes = threading.Event(), threading.Event()
        fetch = remote._fetch

        def slow(*given):
            blocks = fetch(*given)
            came.set()
            assert goes.wait(WAIT_S)
            return blocks

        remote._fetch = slow
        reader = threading.Thread(target=store.get, args=(KEYS[0],))
        deleter = threading.Thread(target=store.delete, args=(KEYS,))
        reader.start()
        assert came.wait(WAIT_S)
        deleter.start()
        while not store._passage._going:
            time.sleep(0.001)
        goes.set()
        reader.join(WAIT_S)
        deleter.join(WAIT_S)
        store.flush()
        assert store.resting(KEYS) == [None] * len(KEYS)


def test_who_sets_out_while_blocks_are_deleted_keeps_none_of_them(server):
    shared(server)
    with opened(server) as store:
        with store._passage.deleting([KEYS[2].digest]):
            assert right(store.get(KEYS[2]), KEYS[2])
            assert right(store.get(KEYS[3]), KEYS[3])  # which rests on it
            assert right(store.get(KEYS[1]), KEYS[1])
        names = store.resting(KEYS[:4])
    assert names == ["remote", "host", "remote", "remote"]


def test_a_tenant_at_its_quota_fetches_every_byte_once(server, monkeypatch):
    monkeypatch.setattr("kvstore.layout.TARGET_BYTES", 1)  # a record is of one layer
    shared(server)
    tiers, remote = [HostTier(100 * BYTES)], RemoteTier(server.config(), secret=SECRET)
    with TieredStore(tiers, remote=remote, quotas=Quotas(2 * BYTES)) as store, store.pin(KEYS):
        backend, sizes = remote._guarded.backend, []
        get_many = backend.get_many
        backend.get_many = lambda *given: [sizes.append(n) or n for n in get_many(*given)]
        for layer in range(MODEL.num_layers):
            out = rows_for(10, range(1))
            assert all(store.read_many(KEYS, range(layer, layer + 1), out))
        assert store.resting(KEYS) == ["host"] * 2 + ["remote"] * 8
    records = [nbytes for nbytes in sizes if nbytes > BYTES / MODEL.num_layers]
    assert len(records) == 10 * MODEL.num_layers
