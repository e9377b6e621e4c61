"""Values read from their own pages of the data file, around LMDB's map."""

import errno
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from kvstore import extent, fetch, layout
from kvstore.disk import DiskTier
from kvstore.errors import StoreError
from kvstore.extent import UNKNOWN, DataFile
from kvstore.ledger import Ledger, entry_cost, name
from tests.kvstore.crash import MODEL as FORKED
from tests.kvstore.crash import keys_of, opened
from tests.kvstore.make import chain, content, identity, items, right, same

MODEL = identity(num_layers=6, num_kv_heads=4, head_dim=64)  # 4 KiB per layer: values of 8 KiB
KEYS = chain(range(32), model=MODEL)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(layout, "TARGET_BYTES", 8192)


@pytest.fixture
def tier(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(KEYS, MODEL))
    yield tier
    with suppress(StoreError):  # of a file that was cut short
        tier.close()


@pytest.fixture
def calls(monkeypatch):
    """Reads of values, by Python alone: `file` around the map, `map` through it."""
    monkeypatch.setattr(fetch, "library", lambda _: None)
    seen = {"file": 0, "map": 0}

    def counted(what, method):
        def call(*args):
            seen[what] += 1
            return method(*args)

        return call

    monkeypatch.setattr(DataFile, "read", counted("file", DataFile.read))
    monkeypatch.setattr(Ledger, "record", counted("map", Ledger.record))
    return seen


def entry_of(tier, key):
    with tier.reading() as txn:
        return tier.ledger.get(txn, key.digest)


def set_pages(tier, key, pages):
    with tier.changing() as txn:
        entry = tier.ledger.get(txn, key.digest)
        txn.put(key.digest, replace(entry, pages=pages).pack(), db=tier.ledger.env.entries)


def all_right(tier, keys=KEYS):
    return all(right(tier.get(key), key, MODEL) for key in keys)


def test_large_values_are_read_around_the_map(tier, calls):
    assert all(entry_of(tier, key).pages.count(UNKNOWN) == 0 for key in KEYS)
    assert all_right(tier)
    assert same(tier.read(KEYS[3], range(1, 5)), content(KEYS[3], MODEL)[1:5])
    assert calls == {"file": 3 * len(KEYS) + 3, "map": 0}


def test_pages_are_known_where_freed_ones_are_used_again(tier, calls):
    tier.delete(KEYS[4:])
    for first in (100, 200, 300):  # freed pages come back two commits later
        tier.put(items(chain(range(first, first + 16), model=MODEL), MODEL))
    calls["map"] = 0
    for first in (100, 200, 300):
        assert all_right(tier, chain(range(first, first + 16), model=MODEL))
    assert calls["map"] == 0


def test_small_values_are_read_through_the_map(tier, calls):
    small = chain(range(4))
    tier.put(items(small))
    assert entry_of(tier, small[0]).pages == (UNKNOWN,)
    calls["map"] = 0
    assert right(tier.get(small[0]), small[0])
    assert calls == {"file": 0, "map": 1}


def test_another_layout_of_pages_means_the_map(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(extent, "_OVERFLOW", 0x20)
    tier = DiskTier(tmp_path / "other", 1 << 30)
    tier.put(items(KEYS, MODEL))
    assert entry_of(tier, KEYS[0]).pages == (UNKNOWN,) * 3
    assert all_right(tier)
    assert calls["file"] == 0
    tier.close()


@pytest.mark.parametrize("wrong", ["another block's", "a table's", "behind the end"])
def test_wrong_pages_cost_a_second_read_once_and_nothing_else(tier, calls, wrong):
    others = {"a table's": (2,) * 3, "behind the end": (1 << 40,) * 3}
    set_pages(tier, KEYS[2], others.get(wrong) or entry_of(tier, KEYS[5]).pages)
    assert [all_right(tier) for _ in range(3)] == [True] * 3
    assert tier.corrupt == 0
    assert calls["map"] == 3 * 3
    assert calls["file"] == 3 * 3 * (len(KEYS) - 1) + 3
    tier.delete([KEYS[2]])
    tier.put(items(KEYS, MODEL))  # lies where its new entry says
    calls["map"] = 0
    assert all_right(tier)
    assert calls["map"] == 0


def test_a_compacted_copy_serves_all_its_blocks(tier, tmp_path):
    tier.put(items(chain(range(100, 116), model=MODEL), MODEL))
    tier.delete(KEYS[4:])
    (tmp_path / "copy").mkdir()
    tier.ledger.env.lmdb.copy(str(tmp_path / "copy"), compact=True)
    copy = DiskTier(tmp_path / "copy", 1 << 30)
    assert all_right(copy, KEYS[:4] + chain(range(100, 116), model=MODEL))
    assert copy.corrupt == 0
    assert copy._moved
    copy.close()


@pytest.mark.parametrize("known", [True, False], ids=["around the map", "through the map"])
@pytest.mark.parametrize("at", [0, 100, 175, 176, 176 + 8191])
def test_a_flipped_byte_on_disk_is_a_miss(tier, tmp_path, known, at):
    pages = entry_of(tier, KEYS[2]).pages
    if not known:
        set_pages(tier, KEYS[2], (UNKNOWN,) * 3)
    with (tmp_path / "store" / "data.mdb").open("r+b") as file:
        file.seek(pages[1] * 4096 + 16 + at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    assert tier.read(KEYS[2], range(2)) is not None
    assert tier.read(KEYS[2], range(2, 3)) is None
    assert tier.corrupt == 1


def test_an_io_error_is_a_miss_and_the_map_is_not_touched(tier, calls, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    assert tier.get(KEYS[0]) is None
    assert (tier.corrupt, calls["map"]) == (1, 0)


@pytest.mark.parametrize("most", [1, 100, 176, 177, 5000])
def test_short_reads_are_continued(tier, calls, monkeypatch, most):
    whole = os.preadv

    def short(handle, buffers, at):
        return whole(handle, [memoryview(buffers[0])[:most]], at)

    monkeypatch.setattr(os, "preadv", short)
    assert all_right(tier, KEYS[:1])
    assert calls["map"] == 0


def test_a_value_behind_the_end_of_the_file_is_not_read(tmp_path):
    (tmp_path / "data").write_bytes(b"x" * 5000)
    file = DataFile(tmp_path / "data", 4096)
    assert file.read(1, [bytearray(5000 - 4096 - 16)])
    assert not file.read(1, [bytearray(100), bytearray(5000)])
    assert not file.read(1 << 40, [bytearray(1)])
    file.close()


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_file_cut_short_is_misses_and_not_a_crash(tier, tmp_path, keep):
    file = tmp_path / "store" / "data.mdb"
    os.truncate(file, int(file.stat().st_size * keep))
    with suppress(StoreError):
        found = [tier.get(key) for key in KEYS]
        assert None in found
        assert all(b is None or right(b, key, MODEL) for b, key in zip(found, KEYS, strict=True))


def test_pages_used_again_under_reads_never_give_another_block(tmp_path):
    cost = entry_cost(content(KEYS[0], MODEL))
    tier = DiskTier(tmp_path / "small", 12 * cost)
    chains = [chain(range(n, n + 16), model=MODEL) for n in range(0, 160, 16)]
    done, wrong, hits = threading.Event(), [], []

    def read():
        while not done.is_set():
            for key in (key for keys in chains for key in keys):
                block = tier.get(key)
                hits.append(block is not None)
                if block is not None and not right(block, key, MODEL):
                    wrong.append(key)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for keys in chains * 6:
        youngest_first = [block.digest for block in tier.residents()][::-1]  # leaves first
        tier.put(items(keys, MODEL), youngest_first)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert any(hits)
    assert tier.corrupt == 0
    tier.close()


def test_pages_used_again_by_another_process_never_give_another_block(tmp_path):
    folder = str(tmp_path / "shared")
    source = f"from tests.kvstore.crash import write; write({folder!r}, 24, 0, 1)"
    with opened(folder, 24) as store, subprocess.Popen(
        [sys.executable, "-c", source], env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
    ) as writer:  # fmt: skip
        hits = 0
        for _ in range(60):
            number = int(os.read(writer.stdout.fileno(), 1 << 16).split()[-1])  # the latest
            for key in keys_of(number) + keys_of(max(0, number - 3)):
                block = store.get(key)
                assert block is None or right(block, key, FORKED)
                hits += block is not None
        writer.kill()
        assert hits > 60
        assert store.stats().tiers["disk"].corrupt == 0


def test_a_record_under_another_name_keeps_its_own_pages(tier):
    """A value moved by hand is still read by its entry, and what it holds decides."""
    with tier.changing() as txn:
        stolen = bytes(txn.get(name(KEYS[1].digest, 0), db=tier.ledger.env.data))
        txn.put(name(KEYS[0].digest, 0), stolen, db=tier.ledger.env.data)
    set_pages(tier, KEYS[0], entry_of(tier, KEYS[1]).pages)
    assert tier.get(KEYS[0]) is None
    assert tier.corrupt == 1
