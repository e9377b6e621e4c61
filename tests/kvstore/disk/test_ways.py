"""A record comes the fastest way there is, and is right whichever way it comes."""

import errno
import os
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.disk import fetch, loads, values, ways
from kvstore.disk.tier import DiskTier
from kvstore.disk.values import PAGE_BYTES
from kvstore.disk.ways import CACHED, DIRECT, MAPPED, Ways
from kvstore.record import HEADER_BYTES
from native.library import library
from tests.kvstore.cold import drop, is_in_memory
from tests.kvstore.make import chain, content, identity, items, same
from tests.kvstore.stored import place_of, values_file

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
        drop(values_file(tmp_path / "store"))
        tier = DiskTier(tmp_path / "store", 1 << 30)
    return tier


@pytest.fixture
def again(monkeypatch):
    """The blocks that were not right at first, and were looked at once more."""
    seen, look = [], loads._is_right_again

    def note(access, read):
        seen.append(read.entry.key)
        return look(access, read)

    monkeypatch.setattr(loads, "_is_right_again", note)
    return seen


def found(tier):
    """Which blocks are there; they must be right."""
    out = torch.zeros(len(KEYS), *MODEL.block_shape(4), dtype=MODEL.torch_dtype)
    there = tier.read_many(KEYS, range(4), out)
    for key, row, is_there in zip(KEYS, out, there, strict=True):
        assert not is_there or same(row, content(key, MODEL))
    assert tier.corrupt == 0
    return there


def read(tier):
    assert found(tier) == [True] * len(KEYS)


def test_what_is_not_in_the_page_cache_passes_it_by_once(tier, tmp_path, taken, again):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    read(tier)
    assert taken == {DIRECT: len(KEYS)}
    read(tier)
    assert taken[DIRECT] == len(KEYS)
    assert taken[CACHED] > 0  # with the kernel's readahead: of others, too
    before = taken[MAPPED]
    read(tier)
    assert taken[MAPPED] == before + len(KEYS)
    assert not again


def test_records_come_in_several_ways_in_one_read(tier, tmp_path, taken, again):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    places = [place_of(tier, key) for key in KEYS]
    with values_file(tmp_path / "store").open("rb") as file:
        for place in places[::3]:  # a third is in the page cache, another has passed it by
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # and no other with it
            os.pread(file.fileno(), PAGE_BYTES + RECORD_BYTES, place)
    for place in places[1::3]:
        tier.access.env.ways.took(place // PAGE_BYTES, DIRECT)
    taken.clear()
    read(tier)
    assert not again
    assert all(taken[way] > len(KEYS) / 8 for way in (CACHED, DIRECT, MAPPED)), taken


@pytest.mark.parametrize("page", [1 << 20, 1 << 30], ids=["in the map", "behind the map"])
def test_a_page_behind_the_end_of_the_file_costs_no_other_record(
    tier, monkeypatch, taken, again, page
):
    find, astray = loads._find, KEYS[len(KEYS) // 2]

    def strayed(access, txn, key):
        entry = find(access, txn, key)
        return replace(entry, page=page) if key == astray else entry

    monkeypatch.setattr(loads, "_find", strayed)
    assert found(tier) == [key != astray for key in KEYS]
    assert again == [astray]
    assert taken.total() == len(KEYS)


def test_what_was_just_written_is_copied_out_of_the_map(tier, taken, again):
    tier.clear()
    tier.put(items(KEYS, MODEL))
    read(tier)
    assert taken == {MAPPED: len(KEYS)}
    assert not again


def test_what_the_file_grew_by_since_it_was_opened_is_copied_out_of_the_map(tmp_path, taken):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    assert values_file(tmp_path / "store").stat().st_size == 0
    tier.put(items(KEYS, MODEL))
    read(tier)
    assert taken == {MAPPED: len(KEYS)}
    tier.close()


def test_what_lies_behind_the_map_comes_another_way(tmp_path, monkeypatch, taken, again):
    monkeypatch.setattr(values, "MAP_BYTES", 16 * PAGE_BYTES)
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(KEYS, MODEL))
    read(tier)
    assert taken == {MAPPED: 3, CACHED: len(KEYS) - 3}
    assert not again
    tier.close()


def test_where_a_file_cannot_be_mapped_it_is_read(tmp_path, monkeypatch, taken, again):
    monkeypatch.setattr(values, "_map", lambda _: 0)
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(KEYS, MODEL))
    read(tier)
    assert taken == {CACHED: len(KEYS)}
    assert not again
    tier.close()


def test_a_map_goes_when_the_store_is_closed(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    name = values_file(tmp_path / "store").name
    assert name in Path("/proc/self/maps").read_text()
    tier.close()
    assert name not in Path("/proc/self/maps").read_text()


def test_without_a_guard_the_map_is_not_touched(tier, monkeypatch, taken):
    monkeypatch.setattr(tier.access.env.ways, "_mapped_at", 0)
    read(tier)
    read(tier)
    assert MAPPED not in taken


def test_a_file_system_without_direct_reads_is_read_through_its_cache(tier, monkeypatch, taken):
    monkeypatch.setattr(tier.access.env.ways, "_direct", -1)
    monkeypatch.setattr(tier.access.env.ways, "_mapped_at", 0)
    read(tier)
    assert set(taken) == {CACHED}


def test_a_file_that_refuses_such_a_read_is_read_through_its_cache(tier, tmp_path, taken, again):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    os.close(tier.access.env.ways._direct)
    tier.access.env.ways._direct = refusing = os.pidfd_open(os.getpid())  # no file at all
    with pytest.raises(OSError, match=r"argument|seek") as error:
        os.preadv(refusing, [bytearray(1)], 0)
    if error.value.errno != errno.EINVAL:
        pytest.skip("before Linux 6.9 it refuses in another way")
    read(tier)
    assert taken == {CACHED: len(KEYS)}
    assert not again


def test_a_system_without_direct_reads_reads_through_its_cache(tmp_path, monkeypatch, taken):
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    monkeypatch.delattr(os, "O_DIRECT")
    tier = reopened(tmp_path, put=True)
    read(tier)
    tier.close()
    assert taken[DIRECT] == 0 < taken[CACHED]


def test_what_is_remembered_is_bounded(tier, monkeypatch):
    monkeypatch.setattr(ways, "REMEMBERED", 3)
    for page in range(2, 10):
        tier.access.env.ways.took(page, DIRECT)
    way = tier.access.env.ways.way
    assert [way(page) for page in (6, 7, 8, 9)] == [DIRECT, CACHED, CACHED, CACHED]


def test_an_open_file_is_read_around_its_cache_by_the_name_it_had(tmp_path, taken):
    tier = reopened(tmp_path, put=True)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    read(tier)
    tier.close()


def test_threads_that_remember_at_once_do_not_disturb_each_other(tier, monkeypatch):
    monkeypatch.setattr(ways, "REMEMBERED", 8)
    interval, failed, taken = sys.getswitchinterval(), [], tier.access.env.ways

    def remember(first):
        try:
            for page in range(first, first + 20_000):
                taken.took(page, DIRECT)
        except RuntimeError as error:
            failed.append(error)

    threads = [threading.Thread(target=remember, args=(10**6 * i,)) for i in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert len(taken._once) == 8
