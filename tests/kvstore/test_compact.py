"""A store grows no further than what it held, and can be made smaller when nobody has it open."""

import os
import random
import signal

import pytest

from kvstore import compact as module
from kvstore.compact import compact
from kvstore.disk import DiskTier
from kvstore.errors import StoreError
from kvstore.ledger import entry_cost
from kvstore.store import TieredStore
from tests.kvstore.make import chain, content, identity, items, right
from tests.kvstore.test_readers import reading

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)


def keys(number, size=4):
    return chain(range(1000 * number, 1000 * number + 8 * size), model=MODEL, size=size)


@pytest.fixture
def path(tmp_path):
    """A store that held ten times as much as it does."""
    with TieredStore([DiskTier(tmp_path / "store", 1 << 30)]) as store:
        for number in range(10):
            store.put(items(keys(number), MODEL))
        store.flush()
        for number in range(1, 10):
            store.delete(keys(number))
    return tmp_path / "store"


def test_compacting_keeps_every_block_and_where_it_lies(path, monkeypatch):
    before, after = compact(path)
    assert (path / "data.mdb").stat().st_size == after < before / 4
    tier = DiskTier(path, 1 << 30)
    monkeypatch.setattr(tier, "_through_map", None)  # all are where their entries say
    assert all(right(tier.get(key), key, MODEL) for key in keys(0))
    with TieredStore([tier]) as store:
        assert store.audit().clean
        store.put(items(keys(1), MODEL))
        store.flush()
        assert store.lookup(keys(1)) == 8
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb", "verified"]


def test_a_store_that_is_open_is_not_compacted(path):
    with TieredStore([DiskTier(path, 1 << 30)]), pytest.raises(StoreError, match="open in this"):
        compact(path)
    pid = reading(path)
    try:
        with pytest.raises(StoreError, match="open in another process"):
            compact(path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert compact(path)


def test_a_crash_before_the_end_leaves_the_store_as_it_was(path, monkeypatch):
    def crash(_env):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_place", crash)
    with pytest.raises(KeyboardInterrupt):
        compact(path)
    monkeypatch.undo()
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb", "verified"]
    with TieredStore([DiskTier(path, 1 << 30)]) as store:
        assert store.lookup(keys(0)) == 8


def test_damaged_tables_are_not_compacted(path):
    data = bytearray((path / "data.mdb").read_bytes())
    data[8 * 4096 :] = bytes(len(data) - 8 * 4096)
    (path / "data.mdb").write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        compact(path)
    assert (path / "data.mdb").read_bytes() == data


def churned(path, sizes, times, dice):
    """Blocks of these sizes, put and evicted; the size of the file over what is live."""
    blocks = 200
    room = blocks * sum(cost(size) for size in sizes) // len(sizes)
    tier = DiskTier(path, room)
    with TieredStore([tier]) as store:
        for number in range(times * blocks // 8):
            store.put(items(keys(number, dice.choice(sizes)), MODEL))
            store.flush()
        assert store.stats().tiers["disk"].evictions > (times - 2) * blocks
        return (path / "data.mdb").stat().st_size / room


def cost(size):
    return entry_cost(content(keys(0, size)[0], MODEL))


def test_the_file_grows_to_what_it_holds_and_three_batches_more(tmp_path):
    # a batch is 8 of 200 blocks, so three of them are 12 %
    assert churned(tmp_path / "store", [4], 4, random.Random(0)) < 1.13


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[16], [4, 16, 64], [64, 60, 56, 52]], ids=str)
def test_under_long_churn_of_blocks_of_any_sizes_the_file_grows_by_five_percent(tmp_path, sizes):
    dice, tokens = random.Random(1), 4000
    room, batch = 1600 * cost(sizes[0]), 8
    assert tokens
    with TieredStore([DiskTier(tmp_path / "store", room)]) as store:
        for number in range(8 * 1600 // batch):
            store.put(items(keys(number, dice.choice(sizes)), MODEL))
            store.flush()
        live = store.stats().tiers["disk"].used_bytes
    assert live > 0.9 * room
    assert (tmp_path / "store" / "data.mdb").stat().st_size <= 1.05 * room
