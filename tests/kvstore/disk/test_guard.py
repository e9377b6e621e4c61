"""A file that is cut, deleted or replaced while it is open costs misses, never the process."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing, contextmanager, suppress

import lmdb
import pytest

from kvstore.disk import guard, loads
from kvstore.disk.access import Access
from kvstore.disk.environment import VALUES
from kvstore.disk.explained import explained
from kvstore.disk.tier import DiskTier
from kvstore.errors import CorruptRecord, StoreError
from kvstore.store import TieredStore
from native.library import library
from tests.kvstore.make import chain, identity, items, right
from tests.kvstore.stored import entry_of, values_file

MODEL = identity(num_layers=4, num_kv_heads=4, head_dim=64)
KEYS = chain(range(4 * 48), model=MODEL)
TOUCH = """
import faulthandler, mmap, sys
from pathlib import Path
{before}
from kvstore.disk.guard import Guard
path = Path(sys.argv[1])
path.write_bytes(bytes(3 * mmap.PAGESIZE))
with path.open("r+b") as file:
    seen = mmap.mmap(file.fileno(), 0)
    guard = Guard(path)
    {after}
    file.truncate(0)
    print(seen[mmap.PAGESIZE + 100], guard.faults, flush=True)
"""


@pytest.fixture(autouse=True)
def compiled():
    if library(guard.SOURCE) is None:
        pytest.skip("no C compiler here: nothing is guarded")


@pytest.fixture
def tier(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(KEYS, MODEL))
    yield tier
    with suppress(StoreError):
        tier.close()


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )


def served(tier):
    found = [(key, tier.get(key)) for key in KEYS]
    assert all(block is None or right(block, key, MODEL) for key, block in found)
    return [block is not None for _, block in found]


def test_a_read_behind_the_end_finds_a_blank_page_and_is_counted(tmp_path):
    done = run("-c", TOUCH.format(before="", after=""), tmp_path / "file")
    assert (done.returncode, done.stdout) == (0, "0 1\n"), done.stderr


@pytest.mark.parametrize("before", ["", "faulthandler.enable()"])
def test_a_bus_error_elsewhere_is_passed_on(tmp_path, before):
    done = run("-c", TOUCH.format(before=before, after="guard.close()"), tmp_path / "file")
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == bool(before)


def test_a_file_whose_map_is_not_found_is_not_guarded(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with closing(guard.Guard(path)) as made:
        assert not made.guards


def test_who_met_a_blank_page_is_told_and_who_comes_later_finds_the_file(tier, tmp_path):
    data = tmp_path / "store" / "data.mdb"
    whole, there = data.read_bytes(), tier.access.env.guard
    os.truncate(data, 0)
    with pytest.raises(CorruptRecord, match="cut short"), there.whole():
        tier.access.env.lmdb.info()
    data.write_bytes(whole)
    with there.whole():
        assert tier.access.env.lmdb.info()["last_pgno"] > 2


@pytest.mark.parametrize("keep", [0, 0.002, 0.01, 0.5, 0.9])
def test_what_a_cut_file_still_has_is_served_and_nothing_more_is_written(tier, tmp_path, keep):
    data = tmp_path / "store" / "data.mdb"
    size = int(data.stat().st_size * keep)
    os.truncate(data, size)
    found = served(tier)
    assert sum(found) <= keep * len(KEYS)
    with pytest.raises(StoreError):
        tier.put(items(chain(range(5000, 5004), model=MODEL), MODEL))
    assert served(tier) == found
    assert data.stat().st_size == size
    tier.close()
    with pytest.raises(StoreError):
        DiskTier(tmp_path / "store", 1 << 30)


@pytest.mark.parametrize("renewed", [True, False])
def test_blank_pages_in_the_map_of_values_cost_no_block(tier, tmp_path, monkeypatch, renewed):
    file, env, again = values_file(tmp_path / "store"), tier.access.env, []
    whole, look = file.read_bytes(), loads._is_right_again
    monkeypatch.setattr(loads, "_is_right_again", lambda *a: again.append(1) or look(*a))
    os.truncate(file, 0)
    for key in KEYS[::2]:
        ctypes.string_at(env.values.map_start + 4096 * entry_of(tier, key).page, 1)
    assert (env.values_guard.faults, env.guard.faults) == (len(KEYS[::2]), 0)
    file.write_bytes(whole)
    if not renewed:
        monkeypatch.setattr(env.values_guard, "renew", lambda: None)
    assert served(tier) == [True] * len(KEYS)
    assert len(again) == (0 if renewed else len(KEYS[::2]))
    assert (tier.corrupt, tier.quarantined) == (0, 0)


@pytest.mark.parametrize("keep", [0, 0.002, 0.01, 0.5, 0.9])
def test_what_a_cut_values_file_still_has_is_served_and_the_rest_put_again(tier, tmp_path, keep):
    file = values_file(tmp_path / "store")
    end = int(file.stat().st_size * keep)
    os.truncate(file, end)
    whole = [entry_of(tier, key).extent.end * 4096 <= end for key in KEYS]
    tier.close()
    with TieredStore([DiskTier(tmp_path / "store", 1 << 30)]) as store:
        again = store._levels[0].tier
        assert served(again) == whole
        store.put(items(KEYS, MODEL))
        store.flush()
        assert served(again) == [True] * len(KEYS)
        assert store.audit().clean


def test_a_trouble_of_all_blocks_is_said_once(tier, tmp_path, caplog):
    os.truncate(tmp_path / "store" / "data.mdb", 0)
    assert [tier.held(KEYS) for _ in range(3)] == [[False] * len(KEYS)] * 3
    assert len([x for x in caplog.records if "all blocks" in x.message]) == 1


def test_numbers_of_a_store_whose_file_was_cut_are_the_last_ones(tier, tmp_path):
    store = TieredStore([tier])
    before = store.stats().tiers["disk"]
    os.truncate(tmp_path / "store" / "data.mdb", 0)
    assert store.lookup(KEYS) == 0
    after = store.stats().tiers["disk"]
    assert after.used_bytes == before.used_bytes > 0
    assert after.groups == before.groups
    assert after.misses > before.misses
    with suppress(StoreError):
        store.close()


def test_blocks_that_cannot_be_looked_for_are_not_said_to_be_deleted(tier, tmp_path):
    store = TieredStore([tier])
    os.truncate(tmp_path / "store" / "data.mdb", 0)
    with pytest.raises(StoreError):
        store.delete(KEYS[:1])
    with suppress(StoreError):
        store.close()


def test_after_a_commit_that_failed_in_its_last_step_blocks_are_misses(tier, monkeypatch):
    @contextmanager
    def panicking(self):
        with explained(self.env.path):
            raise lmdb.PanicError("what LMDB says then, always")
        yield

    monkeypatch.setattr(Access, "reading", panicking)
    monkeypatch.setattr(Access, "changing", panicking)
    assert tier.held(KEYS) == [False] * len(KEYS)
    assert tier.get(KEYS[0]) is None
    with pytest.raises(StoreError, match="open the store again"):
        tier.put(items(KEYS, MODEL))
    tier.close()


def test_tables_that_a_cut_made_unknown_are_misses(tier, monkeypatch):
    def gone(*_):
        raise lmdb.BadDbiError("what LMDB says of a table whose record it does not find")

    monkeypatch.setattr(tier.access.ledger, "get", gone)
    assert tier.get(KEYS[0]) is None


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_deleted_while_open_serves_what_is_open_and_refuses_more(tier, tmp_path, replaced):
    shutil.rmtree(tmp_path / "store")
    other = DiskTier(tmp_path / "other", 1 << 30) if replaced else None
    if other is not None:
        other.close()
        (tmp_path / "other").rename(tmp_path / "store")
    assert served(tier) == [True] * len(KEYS)
    with pytest.raises(StoreError, match="deleted, or replaced"):
        tier.put(items(chain(range(5000, 5004), model=MODEL), MODEL))
    with pytest.raises(StoreError, match="deleted, or replaced"):
        tier.delete(KEYS[:1])
    tier.close()


@pytest.mark.parametrize("name", ["data.mdb", "values-*", "lock.mdb"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_deleted_while_open_is_still_read_and_no_more_written(
    tier, tmp_path, name, replaced
):
    (file,) = (tmp_path / "store").glob(name)
    whole = file.read_bytes()
    if replaced:
        (tmp_path / "other").write_bytes(whole)
        (tmp_path / "other").rename(file)
    else:
        file.unlink()
    assert served(tier) == [True] * len(KEYS)
    with pytest.raises(StoreError, match=f"{file.name} was deleted, or replaced"):
        tier.put(items(chain(range(5000, 5004), model=MODEL), MODEL))
    with pytest.raises(StoreError, match=f"{file.name} was deleted, or replaced"):
        tier.delete(KEYS[:1])
    assert served(tier) == [True] * len(KEYS)
    assert not replaced or file.read_bytes() == whole
    tier.close()


def test_a_store_without_its_values_is_a_clear_error(tier, tmp_path):
    tier.close()
    values_file(tmp_path / "store").unlink()
    with pytest.raises(CorruptRecord, match=r"values-.*which holds all blocks, is gone; delete"):
        DiskTier(tmp_path / "store", 1 << 30)


@pytest.mark.parametrize("name", [None, b"", b"values-", b"values-0g", b"values-0/../../mine"])
def test_a_store_that_does_not_say_where_its_values_are_is_a_clear_error(tier, tmp_path, name):
    with tier.access.changing() as txn:
        if name is None:
            txn.delete(VALUES, db=tier.access.ledger.env.info)
        else:
            txn.put(VALUES, name, db=tier.access.ledger.env.info)
    tier.close()
    with pytest.raises(CorruptRecord, match="does not say where its blocks are; delete"):
        DiskTier(tmp_path / "store", 1 << 30)
    assert values_file(tmp_path / "store").stat().st_size > 0


@pytest.mark.parametrize("name", ["data.mdb", "values-*"])
def test_a_file_cut_after_its_folder_was_deleted_is_misses(tier, tmp_path, name):
    (file,) = (tmp_path / "store").glob(name)
    with file.open("r+b") as data:
        shutil.rmtree(tmp_path / "store")
        data.truncate(data.seek(0, os.SEEK_END) // 2)
    assert False in served(tier)


def cuts(folder, rounds, seed):
    done = run("-m", "tests.kvstore.cut", folder, rounds, seed)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_files_cut_at_any_moment_of_reading_and_writing_cost_no_process(tmp_path):
    assert cuts(tmp_path, 8, seed=1) == {"0": 8}


@pytest.mark.slow
def test_many_files_cut_at_any_moment_cost_no_process(tmp_path):
    assert cuts(tmp_path, 300, seed=2) == {"0": 300}
