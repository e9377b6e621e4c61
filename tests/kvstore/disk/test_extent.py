"""Values in pages of a file: where LMDB puts them, and what the store reads from its own."""

import errno
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace

import lmdb
import numpy as np
import pytest

from kvstore import layout
from kvstore.disk import extent, fetch
from kvstore.disk.extent import UNKNOWN, DataFile, behind, first_page, span
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from kvstore.store import TieredStore
from tests.kvstore.crash import MODEL as FORKED
from tests.kvstore.crash import keys_of, opened
from tests.kvstore.make import chain, content, identity, items, right, same
from tests.kvstore.stored import entry_of, flip, values_file

MODEL = identity(num_layers=6, num_kv_heads=4, head_dim=64)  # 4 KiB per layer: values of 8 KiB
KEYS = chain(range(32), model=MODEL)
LARGE = [2049, 4080, 4081, 20_000]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(layout, "TARGET_BYTES", 8192)


@pytest.fixture
def env(tmp_path):
    with lmdb.open(str(tmp_path), map_size=1 << 30) as env:
        yield env


def put(env, values):
    """Where LMDB puts values, as their writer sees it."""
    with env.begin(write=True, buffers=True) as txn:
        for name, value in values.items():
            txn.put(name, value)
        return {name: first_page(txn.get(name), 4096) for name in values}


def made(sizes, seed=0):
    dice = np.random.default_rng(seed)
    return {b"%d of %d" % (seed, size): dice.bytes(size) for size in sizes}


def read(tmp_path, values, pages):
    """Whether the pages hold the values, read without LMDB."""
    file = DataFile(tmp_path / "data.mdb", 4096)
    buffers = {name: bytearray(len(value)) for name, value in values.items()}
    assert all(file.read(pages[name], [buffers[name]]) for name in values)
    file.close()
    return buffers == values


def test_the_pages_of_large_values_are_known_to_who_writes_them(env, tmp_path):
    values = made(LARGE)
    pages = put(env, values)
    assert UNKNOWN not in pages.values()
    assert read(tmp_path, values, pages)


def test_pages_are_known_where_freed_ones_are_used_again(env, tmp_path):
    first = made(LARGE)
    before = put(env, first)
    with env.begin(write=True) as txn:
        assert all(txn.delete(name) for name in first)
    now = {seed: (made(LARGE, seed), put(env, made(LARGE, seed))) for seed in (1, 2, 3)}
    assert any(set(pages.values()) & set(before.values()) for _, pages in now.values())
    assert all(read(tmp_path, *of) for of in now.values())


def test_small_values_have_no_pages_of_their_own(env):
    assert set(put(env, made([1, 100, 2000])).values()) == {UNKNOWN}


def test_in_another_layout_of_pages_none_is_known(env, monkeypatch):
    monkeypatch.setattr(extent, "_OVERFLOW", 0x20)
    assert set(put(env, made(LARGE)).values()) == {UNKNOWN}


def test_a_value_behind_the_end_of_the_file_is_not_read(tmp_path):
    (tmp_path / "data").write_bytes(b"x" * 5000)
    file = DataFile(tmp_path / "data", 4096)
    assert file.read(1, [bytearray(5000 - 4096 - 16)])
    assert not file.read(1, [bytearray(100), bytearray(5000)])
    assert not file.read(1 << 40, [bytearray(1)])
    file.close()


def test_a_file_has_its_name_until_another_has_it_or_none(tmp_path):
    (tmp_path / "data").touch()
    file = DataFile(tmp_path / "data", 4096)
    assert file.is_at(tmp_path / "data")
    (tmp_path / "other").touch()
    (tmp_path / "other").rename(tmp_path / "data")
    assert not file.is_at(tmp_path / "data")
    (tmp_path / "data").unlink()
    assert not file.is_at(tmp_path / "data")
    file.close()


def test_what_is_left_behind_a_part_is_all_the_rest():
    whole = [memoryview(b"abc"), memoryview(b""), memoryview(b"de")]
    left = [b"".join(behind(whole, count)) for count in range(6)]
    assert left == [b"abcde", b"bcde", b"cde", b"de", b"e", b""]
    assert behind(whole, 5) == []


@pytest.fixture
def tier(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(KEYS, MODEL))
    yield tier
    with suppress(StoreError):  # of a file that was cut short
        tier.close()


@pytest.fixture
def calls(monkeypatch):
    """Reads of records, by Python alone."""
    monkeypatch.setattr(fetch, "library", lambda _: None)
    seen, method = [], DataFile.read

    def counted(file, page, buffers):
        seen.append(page)
        return method(file, page, buffers)

    monkeypatch.setattr(DataFile, "read", counted)
    return seen


def set_page(tier, key, page):
    with tier.access.changing() as txn:
        entry = tier.access.ledger.get(txn, key.digest)
        txn.put(key.digest, replace(entry, page=page).pack(), db=tier.access.ledger.env.entries)


def all_right(tier, keys=KEYS):
    return all(right(tier.get(key), key, MODEL) for key in keys)


def pages_of(tier, keys):
    """All pages of blocks, of which no two are the same."""
    extents = [entry_of(tier, key).extent for key in keys]
    pages = [page for extent in extents for page in range(extent.start, extent.end)]
    assert len(set(pages)) == len(pages)
    return set(pages)


def test_each_record_lies_behind_the_one_before_and_is_read_once(tier, calls):
    pages = [page for key in KEYS for page in entry_of(tier, key).pages]
    each = span(176 + 8192, 4096)
    assert sorted(pages) == list(range(0, each * 3 * len(KEYS), each))
    assert all_right(tier)
    assert calls == pages
    assert same(tier.read(KEYS[3], range(1, 5)), content(KEYS[3], MODEL)[1:5])
    assert calls[len(pages) :] == entry_of(tier, KEYS[3]).pages


def test_small_values_have_pages_of_their_own_too(tier):
    small = chain(range(4))
    tier.put(items(small))
    assert entry_of(tier, small[0]).extent.pages == 2
    pages_of(tier, [*KEYS, *small])
    assert right(tier.get(small[0]), small[0])


def test_freed_pages_are_used_again_from_the_next_change_on(tier):
    freed, end = pages_of(tier, KEYS[4:]), values_file(tier.access.ledger.env.path).stat().st_size
    tier.delete(KEYS[4:])
    others = chain(range(100, 116), model=MODEL)
    tier.put(items(others, MODEL))
    assert pages_of(tier, KEYS[:4] + others) & freed == freed
    assert values_file(tier.access.ledger.env.path).stat().st_size == end
    assert all_right(tier, KEYS[:4] + others)


@pytest.mark.parametrize("wrong", ["another block's", "a page further", "behind the end"])
def test_an_entry_that_names_other_pages_is_damage(tier, wrong):
    theirs, own = entry_of(tier, KEYS[5]).page, entry_of(tier, KEYS[2]).page
    pages = {"another block's": theirs, "a page further": own + 1, "behind the end": 1 << 40}
    set_page(tier, KEYS[2], pages[wrong])
    for _ in range(3):
        assert [tier.get(key) is not None for key in KEYS] == [key != KEYS[2] for key in KEYS]
    assert (tier.corrupt, tier.quarantined) == (1, 1)
    with TieredStore([tier]) as store:
        assert store.audit(repair=True).repaired
        store.put(items(KEYS, MODEL))
        store.flush()
        assert all_right(tier)
        assert store.audit().clean


@pytest.mark.parametrize("at", [0, 100, 175, 176, 176 + 8191])
def test_a_flipped_byte_on_disk_is_a_miss(tier, at):
    flip(tier, KEYS[2], 1, at)
    assert tier.read(KEYS[2], range(2)) is not None
    assert tier.read(KEYS[2], range(2, 3)) is None
    assert tier.corrupt == 1


def test_an_io_error_is_a_miss(tier, calls, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    assert tier.get(KEYS[0]) is None
    assert tier.corrupt == 1


@pytest.mark.parametrize("most", [1, 100, 176, 177, 5000])
def test_short_reads_are_continued(tier, calls, monkeypatch, most):
    whole = os.preadv

    def short(handle, buffers, at):
        return whole(handle, [memoryview(buffers[0])[:most]], at)

    monkeypatch.setattr(os, "preadv", short)
    assert all_right(tier, KEYS[:1])
    assert len(calls) == 3  # and none is looked at again


@pytest.mark.parametrize("keep", [0, 0.3, 0.6, 0.95])
def test_a_values_file_cut_short_costs_what_it_lacks_and_is_mended(tier, keep):
    file = values_file(tier.access.ledger.env.path)
    end = int(file.stat().st_size * keep)
    os.truncate(file, end)
    found = [tier.get(key) for key in KEYS]
    whole = [entry_of(tier, key).extent.end * 4096 <= end for key in KEYS]
    assert [block is not None for block in found] == whole
    assert tier.corrupt == whole.count(False)
    with TieredStore([tier]) as store:
        store.put(items(KEYS, MODEL))
        store.flush()
        assert all_right(tier)
        assert store.audit().clean


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
    assert values_file(tmp_path / "small").stat().st_size < 20 * cost  # they were used again
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
