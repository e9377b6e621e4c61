"""A record comes the fastest way there is, and is right whichever way it comes."""

import mmap
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from kvstore import fetch, ways
from kvstore.disk import DiskTier
from kvstore.record import HEADER_BYTES
from kvstore.ways import CACHED, DIRECT, MAPPED, Ways
from native.library import library
from tests.kvstore.cold import drop, is_in_memory
from tests.kvstore.make import chain, content, identity, items, same

MODEL = identity(num_layers=4, num_kv_heads=4, head_dim=64)
KEYS = chain(range(4 * 64), model=MODEL)
RECORD_BYTES = HEADER_BYTES + content(KEYS[0], MODEL).nbytes


@pytest.fixture(autouse=True)
def compiled():
    if library(fetch.SOURCE) is None:
        pytest.skip("no C compiler here: all is read in one way")


@pytest.fixture
def taken(monkeypatch):
    """How many records came which way."""
    seen, took = Counter(), Ways.took

    def note(self, page, way):
        seen[way] += 1
        took(self, page, way)

    monkeypatch.setattr(Ways, "took", note)
    return seen


@pytest.fixture
def tier(tmp_path):
    DiskTier(tmp_path / "store", 1 << 30).close()
    tier = reopened(tmp_path, put=True)
    yield tier
    tier.close()


def reopened(tmp_path, put=False):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    if put:
        tier.put(items(KEYS, MODEL))
        tier.close()  # pages that a map holds cannot be dropped
        drop(tmp_path / "store" / "data.mdb")
        tier = DiskTier(tmp_path / "store", 1 << 30)
    return tier


def pages_of(tier):
    """Where each block's one record begins."""
    with tier.reading() as txn:
        entries = [tier.ledger.sound(txn, key.digest) for key in KEYS]
    return [page for entry in entries for page in entry.pages]


def read(tier):
    out = torch.zeros(len(KEYS), *MODEL.block_shape(4), dtype=MODEL.torch_dtype)
    assert tier.read_many(KEYS, range(4), out) == [True] * len(KEYS)
    assert all(same(row, content(key, MODEL)) for key, row in zip(KEYS, out, strict=True))
    return tier._moved  # what did not come its way, and was then looked up


def test_what_is_not_in_the_page_cache_passes_it_by_once(tier, tmp_path, taken):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    assert not read(tier)
    around = taken[DIRECT]  # but what lies beside LMDB's first pages
    assert around > len(KEYS) / 2
    read(tier)
    assert taken[DIRECT] == around
    assert taken[CACHED] > 0  # with the kernel's readahead: of others, too
    before = taken[MAPPED]
    read(tier)
    assert taken[MAPPED] == before + len(KEYS)


def test_records_come_in_several_ways_in_one_read(tier, tmp_path, taken):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    pages = pages_of(tier)
    with (tmp_path / "store" / "data.mdb").open("rb") as file:
        for page in pages[::3]:  # a third is in the page cache, another has passed it by
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # and no other with it
            os.pread(file.fileno(), RECORD_BYTES, page * mmap.PAGESIZE)
    for page in pages[1::3]:
        tier._env.ways.took(page, DIRECT)
    taken.clear()
    assert not read(tier)
    assert all(taken[way] > len(KEYS) / 8 for way in (CACHED, DIRECT, MAPPED)), taken


def test_a_page_behind_the_end_of_the_file_costs_no_other_record(tier, monkeypatch, taken):
    find, astray = DiskTier._find, KEYS[len(KEYS) // 2]

    def found(self, txn, key):
        entry = find(self, txn, key)
        return replace(entry, pages=(1 << 30,)) if key == astray else entry

    monkeypatch.setattr(DiskTier, "_find", found)
    assert read(tier) == {astray.digest}
    assert taken.total() == len(KEYS)


def test_what_was_just_written_is_copied_out_of_the_map(tier, taken):
    tier.clear()
    tier.put(items(KEYS, MODEL))
    read(tier)
    assert taken == {MAPPED: len(KEYS)}


def test_without_a_guard_the_map_is_not_touched(tier, monkeypatch, taken):
    monkeypatch.setattr(tier._env.ways, "_mapped_at", 0)
    read(tier)
    read(tier)
    assert MAPPED not in taken


@pytest.mark.parametrize("cause", ["no descriptor", "another alignment"])
def test_a_file_system_without_direct_reads_is_read_through_its_cache(
    tier, monkeypatch, taken, cause
):
    name, value = ("_direct", -1) if cause == "no descriptor" else ("_page_bytes", 8)
    monkeypatch.setattr(tier._env.ways, name, value)
    monkeypatch.setattr(tier._env.ways, "_mapped_at", 0)
    read(tier)
    assert set(taken) == {CACHED}


def test_a_system_without_direct_reads_reads_through_its_cache(tmp_path, monkeypatch, taken):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    monkeypatch.delattr(os, "O_DIRECT")
    tier = reopened(tmp_path, put=True)
    assert not read(tier)
    tier.close()
    assert taken[DIRECT] == 0 < taken[CACHED]


def test_what_is_remembered_is_bounded(tier, monkeypatch):
    monkeypatch.setattr(ways, "REMEMBERED", 3)
    for page in range(2, 10):
        tier._env.ways.took(page, DIRECT)
    assert [tier._env.ways.way(page) for page in (6, 7, 8, 9)] == [DIRECT, CACHED, CACHED, CACHED]


def test_an_open_file_is_read_around_its_cache_by_the_name_it_had(tmp_path, taken):
    tier = reopened(tmp_path, put=True)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    read(tier)
    tier.close()
