"""What a store promises, one promise at a time."""

import threading

import pytest
import torch

from kvstore import sources
from kvstore.block import KVBlock
from kvstore.config import StoreConfig
from kvstore.disk.environment import files_of
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.errors import DeviceFull, StoreError, TierFull
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items, right, same

KEYS = chain(range(40))  # 10 blocks
COST = entry_cost(content(KEYS[0], identity()))
BYTES = content(KEYS[0], identity()).nbytes
MODEL = identity()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "store"


def opened(path, host=100, blocks=100):
    tiers = [HostTier(host * BYTES)] if host else []
    return TieredStore([*tiers, DiskTier(path, blocks * COST)])


def rows_for(count, layers):
    return torch.zeros(count, len(layers), *MODEL.block_shape(4)[1:], dtype=MODEL.torch_dtype)


def test_blocks_survive_a_restart(path):
    with opened(path) as store:
        store.put(items(KEYS))
    with opened(path) as store:
        assert store.lookup(KEYS) == 10
        assert all(right(store.get(key), key) for key in KEYS)
        assert store.audit().clean


def test_a_lookup_counts_leading_keys_only(path):
    with opened(path, host=0) as store:
        store.put(items(KEYS[:3]) + items(chain(range(40, 60))))
        store.flush()
        assert store.lookup(KEYS) == 3
        assert store.lookup(chain(range(40, 60)) + KEYS) == 8
        assert store.lookup([]) == 0
        stats = store.stats().tiers["disk"]
        assert (stats.hits, stats.misses) == (11, 2)


@pytest.mark.parametrize("host", [0, 100])
def test_a_run_of_layers_comes_from_either_tier(path, host):
    with opened(path, host=host) as store:
        store.put(items(KEYS[:1]))
        store.flush()
        want = content(KEYS[0], identity())
        for lo in range(3):
            for hi in range(lo + 1, 4):
                got = store.read(KEYS[0], range(lo, hi))
                assert same(got, want[lo:hi])
                row = torch.zeros_like(got)
                assert store.read(KEYS[0], range(lo, hi), row) is row
                assert same(row, got)
        assert store.read_many(KEYS[:2], range(1), rows_for(2, range(1))) == [True, False]


@pytest.mark.parametrize("host", [0, 100])
def test_many_reads_land_in_the_rows_of_one_tensor(path, host):
    with opened(path, host=host) as store:
        store.put(items(KEYS))
        store.flush()
        wanted = torch.stack([content(key, identity())[1:3] for key in KEYS])
        out = torch.zeros_like(wanted)
        assert store.read_many(KEYS, range(1, 3), out) == [True] * 10
        assert same(out, wanted)
        assert store.read_many([], range(1, 3), out[:0]) == []
        name = "host" if host else "disk"
        stats = store.stats().tiers[name]
        assert (stats.reads, stats.bytes_read) == (10, wanted.nbytes)
        with pytest.raises(ValueError, match="out must be contiguous"):
            store.read(KEYS[0], range(1, 3), out[0].float())


@pytest.mark.parametrize("threads", [1, 4])
def test_many_reads_take_from_each_tier_what_those_before_it_lack(path, monkeypatch, threads):
    monkeypatch.setattr(sources, "READ_THREADS", threads)
    with opened(path) as store:
        store.put(items(KEYS))
        store.flush()
        host = store._levels[0].tier
        host.delete([KEYS[0], KEYS[3], KEYS[4], KEYS[9]])
        absent = chain(range(500, 508))
        keys = [*KEYS[:2], absent[0], *KEYS[2:], absent[1]]
        out = rows_for(12, range(3))
        found = store.read_many(keys, range(3), out)
        assert found == [True] * 2 + [False] + [True] * 8 + [False]
        assert all(
            same(row, content(key, identity()))
            for key, row, is_there in zip(keys, out, found, strict=True)
            if is_there
        )
        tiers = store.stats().tiers
        assert (tiers["host"].reads, tiers["disk"].reads) == (6, 4)
        assert tiers["disk"].bytes_read == 4 * BYTES


def test_layers_that_a_block_does_not_have_are_refused(path):
    for tier in (DiskTier(path, COST), HostTier(COST)):
        tier.put(items(KEYS[:1]))
        for layers in (range(0), range(3, 4), range(-1, 1), range(0, 3, 2)):
            with pytest.raises(ValueError, match="run of the 3 layers"):
                tier.read(KEYS[0], layers)
        tier.close()


def test_putting_a_block_again_changes_nothing(path):
    with opened(path) as store:
        store.put(items(KEYS))
        store.flush()
        before = store.stats().tiers["disk"]
        store.put(items(KEYS) + items(KEYS))
        store.flush()
        assert store.stats().tiers["disk"] == before


def test_the_tail_of_the_oldest_chain_goes_first(path):
    old, new = KEYS[:3], chain(range(100, 112))
    with opened(path, host=0, blocks=5) as store:
        store.put(items(old))
        store.put(items(new))
        store.flush()
        assert store.lookup(old) == 2
        assert store.lookup(new) == 3
        store.put(items(chain(range(200, 204))))
        store.flush()
        assert store.lookup(old) == 1
        assert store.stats().tiers["disk"].evictions == 2


def test_uses_are_remembered_over_a_restart(path):
    old, new = KEYS[:2], chain(range(100, 108))
    with opened(path, host=0, blocks=4) as store:
        store.put(items(old) + items(new))
        store.flush()
        assert store.lookup(old) == 2
    with opened(path, host=0, blocks=4) as store:
        store.put(items(chain(range(200, 208))))
        store.flush()
        assert (store.lookup(old), store.lookup(new)) == (2, 0)


def test_a_pinned_block_is_not_evicted_and_what_does_not_fit_is_skipped(path):
    with opened(path, host=3, blocks=3) as store:
        store.put(items(KEYS[:3]))
        store.flush()
        with store.pin(KEYS[:3]), store.pin(KEYS[:1]):
            store.put(items(chain(range(100, 108))))
            store.flush()
            assert store.lookup(KEYS) == 3
            assert store.lookup(chain(range(100, 108))) == 0
            assert {t.skipped for t in store.stats().tiers.values()} == {2}
        store.put(items(chain(range(100, 108))))
        store.flush()
        assert store.lookup(chain(range(100, 108))) == 2


def test_a_chain_longer_than_the_tier_keeps_its_head(path):
    with opened(path, host=2, blocks=4) as store:
        store.put(items(KEYS))
        store.flush()
        assert store.lookup(KEYS) == 4
        assert store.stats().tiers["disk"].skipped == 6
        assert store.audit().clean


def test_a_chain_does_not_evict_itself_from_the_host():
    with TieredStore([HostTier(2 * BYTES)]) as store:
        for item in items(KEYS):
            store.put([item])
        assert store.lookup(KEYS) == 2


def test_a_block_that_is_a_view_does_not_keep_the_bigger_tensor():
    with TieredStore([HostTier(2 * BYTES)]) as store:
        big = torch.stack([content(KEYS[0], identity())] * 3)
        store.put([(KEYS[0], KVBlock(big[1]))])
        assert store.get(KEYS[0]).data.untyped_storage().nbytes() == BYTES


def test_promotion_fills_the_host_with_leading_blocks(path):
    with opened(path) as store:
        store.put(items(KEYS))
    with opened(path, host=4) as store:
        assert store.promote(KEYS) == 4
        assert store.stats().tiers["host"].blocks == 4
        assert store.promote(KEYS[:2]) == 2
        assert all(right(store.get(key), key) for key in KEYS)
        assert store.promote(chain(range(900, 904))) == 0


def test_a_block_whose_ancestors_are_only_in_the_host_brings_them_to_disk(path):
    with opened(path) as store:
        store.put(items(KEYS[:4]))
        store.flush()
        store._levels[1].tier.clear()
        store.put(items(KEYS[4:]))
        store.flush()
        assert all(key in store._levels[1].tier for key in KEYS)


def test_a_block_whose_ancestors_are_nowhere_is_not_stored_on_disk(path):
    with opened(path, host=0) as store:
        store.put(items(KEYS[4:]))
        store.flush()
        assert not any(key in store._levels[0].tier for key in KEYS)
        assert store.stats().tiers["disk"].skipped == 6
        assert store.audit().clean


@pytest.mark.parametrize(("host", "disk_blocks", "setting"), [(0.5, 9, "host"), (9, 0.5, "disk")])
def test_a_budget_smaller_than_one_block_is_an_error_that_names_it(
    path, host, disk_blocks, setting
):
    tiers = [HostTier(int(host * BYTES)), DiskTier(path, int(disk_blocks * COST))]
    with TieredStore(tiers) as store:
        with pytest.raises(TierFull, match=f"raise {setting}_bytes"):
            store.put(items(KEYS[:1]))
        assert store.lookup(KEYS) == 0


def test_threads_that_put_read_pin_and_evict_at_once_see_only_right_blocks(path):
    chains = [chain(range(100 * i, 100 * i + 24)) for i in range(6)]
    failures = []

    def work(store, turn):
        try:
            for i in range(40):
                keys = chains[(turn * 7 + i * (turn + 1)) % 6]
                with store.pin(keys):
                    found = store.lookup(keys)
                    blocks = [store.get(key) for key in keys[:found]]
                    assert all(right(block, key) for block, key in zip(blocks, keys))
                    store.promote(keys[:2])
                store.put(items(keys))
                rows = rows_for(len(keys), range(1, 2))
                many = zip(keys, rows, store.read_many(keys, range(1, 2), rows), strict=True)
                assert all(same(row, content(key, MODEL)[1:2]) for key, row, there in many if there)
        except BaseException as error:
            failures.append(error)
            raise

    with opened(path, host=8, blocks=20) as store:
        threads = [threading.Thread(target=work, args=(store, turn)) for turn in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.flush()
        assert not failures
        report = store.audit()
        assert report.clean, report.problems


def test_readers_leave_no_snapshot_behind_and_the_file_does_not_grow_with_churn(path):
    with opened(path, host=0, blocks=20) as store:
        env = store._levels[0].tier.access.ledger.env.lmdb
        sizes = []
        for i in range(60):
            keys = chain(range(1000 * i, 1000 * i + 20))
            store.put(items(keys))
            store.flush()
            store.read_many(keys, range(3), rows_for(len(keys), range(3)))
            sizes.append(sum(file.stat().st_size for file in files_of(path)))
        assert sizes[-1] == sizes[30]
        assert sizes[-1] < 3 * 20 * COST
        assert all(line.split()[2] == "-" for line in env.readers().splitlines()[1:])


def test_a_closed_store_refuses_puts_and_closes_twice(path):
    store = opened(path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.put(items(KEYS))


def test_a_host_only_store_needs_no_disk():
    with TieredStore.open(StoreConfig(host_bytes=1 << 20)) as store:
        store.put(items(KEYS))
        store.flush()
        assert store.lookup(KEYS) == 10
        assert store.audit().clean
        store.clear()
        assert store.lookup(KEYS) == 0


def test_a_full_disk_ends_no_program_that_only_read(path, monkeypatch):
    with opened(path) as store:
        store.put(items(KEYS))
    store = opened(path, host=0)
    assert store.lookup(KEYS) == 10
    monkeypatch.setattr(store._levels[0].tier.access, "changing", full)
    store.close()
    with opened(path, host=0) as store:
        assert all(right(store.get(key), key) for key in KEYS)


def full():
    raise DeviceFull("no space left")


def test_all_that_a_store_has_is_closed_where_one_of_it_fails(path, monkeypatch):
    store, closed = opened(path), []
    disk = store._levels[1].tier
    monkeypatch.setattr(store._levels[0].tier, "close", full)
    close = disk.close
    monkeypatch.setattr(disk, "close", lambda: closed.append(close()))
    with pytest.raises(DeviceFull):
        store.close()
    assert closed == [None]
