"""A store grows no further than what it held, and can be made smaller when nobody has it open."""

import os
import random
import signal

import lmdb
import pytest

from kvstore import compact as module
from kvstore.codecs.known import RAW
from kvstore.compact import compact
from kvstore.disk import DiskTier
from kvstore.errors import StoreError, StoreFormatError
from kvstore.ledger import entry_cost
from kvstore.store import TieredStore
from tests.kvstore.crash import forked
from tests.kvstore.make import chain, content, identity, items, right
from tests.kvstore.test_readers import reading

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)


def opened(path):
    return DiskTier(path, 1 << 30)


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


def die(*_args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", ["os.link", "os.replace"])
def test_what_a_killed_process_was_making_goes_when_the_store_is_opened_next(
    path, monkeypatch, step
):
    if step == "os.link":
        os.unlink(path / "data.mdb")
    monkeypatch.setattr(step, die)
    pid = forked(compact if step == "os.replace" else opened, path)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    assert [name for name in os.listdir(path) if name.startswith("new-")]
    opened(path).close()
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb", "verified"]


def test_folders_in_anothers_folder_stay(tmp_path):
    (tmp_path / "new-year").mkdir()
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as txn:
        txn.put(b"mine", b"precious")
    with pytest.raises(StoreFormatError):
        opened(tmp_path)
    assert (tmp_path / "new-year").exists()


def test_damaged_tables_are_not_compacted(path):
    data = bytearray((path / "data.mdb").read_bytes())
    data[8 * 4096 :] = bytes(len(data) - 8 * 4096)
    (path / "data.mdb").write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        compact(path)
    assert (path / "data.mdb").read_bytes() == data


def churned(path, sizes, room, batch, times):
    """Put blocks of these sizes, so many times what there is room for; file over room."""
    dice, put = random.Random(1), 0
    with TieredStore([DiskTier(path, room)]) as store:
        for number in range(1 << 30):
            some = keys(number, dice.choice(sizes))[:batch]
            store.put(items(some, MODEL))
            store.flush()
            put += sum(cost(key.num_tokens) for key in some)
            if put > times * room:
                break
        assert store.stats().tiers["disk"].used_bytes > 0.9 * room
        assert store.audit().clean
    return (path / "data.mdb").stat().st_size / room


def cost(size):
    return entry_cost(content(keys(0, size)[0], MODEL), RAW)


def test_under_churn_the_file_grows_to_what_it_holds_and_three_batches_more(tmp_path):
    room = 300 * cost(16)
    assert churned(tmp_path / "store", [16], room, batch=2, times=2) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[16], [4, 16, 64], [64, 60, 56, 52]], ids=str)
def test_under_long_churn_of_any_sizes_the_file_grows_by_five_percent(tmp_path, sizes):
    assert churned(tmp_path / "store", sizes, 1600 * max(map(cost, sizes)), 8, times=8) <= 1.05
