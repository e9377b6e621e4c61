"""Many blocks read under one transaction: each as if it were read alone."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import lmdb
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvstore import layout
from kvstore.codecs.known import RAW
from kvstore.disk import fetch, loads
from kvstore.disk import tier as disk
from kvstore.disk.entry import Entry
from kvstore.disk.fetch import Part
from kvstore.disk.tier import DiskTier
from kvstore.disk.values import Values
from kvstore.disk.ways import CACHED, DIRECT, MAPPED, Ways
from kvstore.errors import StoreError
from native.library import library
from tests.kvstore.cold import drop
from tests.kvstore.make import chain, content, identity, items, same
from tests.kvstore.stored import entry_of, flip, place_of, values_file

MODEL = identity(num_layers=6, num_kv_heads=4, head_dim=64)  # 4 KiB per layer: values of 8 KiB
KEYS = chain(range(32), model=MODEL)
SOME = range(1, 4)  # half a group and a whole one
ROW_BYTES = 3 * 4096


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(layout, "TARGET_BYTES", 8192)


@pytest.fixture(params=["C", "Python"], autouse=True)
def way(request, monkeypatch):
    """How records are copied: with a compiler, or without."""
    if request.param == "Python":
        monkeypatch.setattr(fetch, "library", lambda _: None)
    elif library(fetch.SOURCE) is None:
        pytest.skip("no C compiler here")
    return request.param


@pytest.fixture
def tier(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(KEYS, MODEL))
    yield tier
    with suppress(StoreError):  # of a file that was cut short
        tier.close()


def read(tier, keys, layers=SOME):
    """Which keys are there; their rows must be right."""
    out = torch.zeros(len(keys), len(layers), *MODEL.block_shape(4)[1:], dtype=MODEL.torch_dtype)
    found = tier.read_many(keys, layers, out)
    for key, row, is_there in zip(keys, out, found, strict=True):
        assert not is_there or same(row, content(key, MODEL)[layers.start : layers.stop])
    return found


def but(*absent, count=8):
    return [i not in absent for i in range(count)]


def at_first_copy(monkeypatch, happens):
    """Let something happen once: after blocks were looked up, before they are copied."""
    copy, pending = fetch.copy, [happens]

    def late(*args):
        while pending:
            pending.pop()()
        copy(*args)

    monkeypatch.setattr(loads, "copy", late)


def changed(tier, change):
    """Change the tier as another thread or process would."""
    with ThreadPoolExecutor(1) as other:
        other.submit(change).result()
    assert tier.corrupt == 0


def pages_of(tier, keys):
    extents = [entry_of(tier, key).extent for key in keys]
    return {page for extent in extents for page in range(extent.start, extent.end)}


@pytest.mark.parametrize(
    "layers", [range(lo, hi) for hi in range(1, 7) for lo in range(hi)], ids=str
)
def test_any_run_of_layers_lands_in_its_row(tier, layers):
    assert read(tier, KEYS, layers) == but()


def test_absent_blocks_are_gaps(tier):
    others = chain(range(100, 108), model=MODEL)
    assert read(tier, [others[0], *KEYS[:2], others[1], *KEYS[2:]]) == but(0, 3, count=10)
    assert read(tier, others) == [False] * 2
    assert read(tier, []) == []


@pytest.mark.parametrize("at", [0, 175, 176, 176 + 8191])
def test_a_flipped_byte_is_a_miss_of_its_block_alone(tier, at):
    flip(tier, KEYS[2], 1, at)
    assert read(tier, KEYS, range(2)) == but()
    assert read(tier, KEYS) == but(2)
    assert read(tier, KEYS, range(2)) == but(2)
    assert (tier.corrupt, tier.quarantined) == (1, 1)


def test_an_io_error_is_a_miss_of_its_block_alone(tier, monkeypatch, way):
    if way == "C":
        pytest.skip("C asks the system itself: see the next test")
    bad, whole = place_of(tier, KEYS[5]), os.preadv

    def fail(handle, buffers, at):
        if at == bad:
            raise OSError(errno.EIO, "Input/output error")
        return whole(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", fail)
    assert read(tier, KEYS) == but(5)
    assert tier.corrupt == 1


def test_a_file_that_cannot_be_read_is_misses(tier, monkeypatch):
    folder = os.open(tier.access.env.path, os.O_RDONLY)
    monkeypatch.setattr(tier.access.env.values, "handle", folder)
    monkeypatch.setattr(tier.access.env.ways, "_direct", os.dup(folder))
    assert read(tier, KEYS) == [False] * 8
    assert all("Is a directory" in reason for reason in tier.access.bad.values())
    monkeypatch.undo()
    os.close(folder)


def test_tables_that_cannot_be_walked_at_one_block_are_a_miss_of_it_alone(tier, monkeypatch):
    get = tier.access.ledger.get

    def fail(txn, digest):
        if digest == KEYS[3].digest:
            raise lmdb.CorruptedError("a page of the tables")
        return get(txn, digest)

    monkeypatch.setattr(tier.access.ledger, "get", fail)
    assert read(tier, KEYS) == but(3)
    assert tier.access.bad.keys() == {KEYS[3].digest}


@pytest.mark.parametrize("keep", [0, 0.3, 0.6, 0.95])
def test_a_file_cut_short_is_misses_and_not_a_crash(tier, keep):
    file = values_file(tier.access.ledger.env.path)
    end = int(file.stat().st_size * keep)
    os.truncate(file, end)
    assert read(tier, KEYS, range(6)) == [entry_of(tier, k).extent.end * 4096 <= end for k in KEYS]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 0.95])
def test_tables_cut_short_are_misses_and_not_a_crash(tier, tmp_path, keep):
    file = tmp_path / "store" / "data.mdb"
    os.truncate(file, int(file.stat().st_size * keep))
    with suppress(StoreError):
        assert False in read(tier, KEYS, range(6)) or keep > 0.9  # of free pages, perhaps


def test_a_file_cut_short_between_lookup_and_copy_is_misses(tier, monkeypatch):
    file, end = values_file(tier.access.ledger.env.path), place_of(tier, KEYS[4]) + 5000
    at_first_copy(monkeypatch, lambda: os.truncate(file, end))
    assert read(tier, KEYS) == [True] * 4 + [False] * 4


@pytest.mark.parametrize("group", [0, 1])
def test_what_was_wrong_once_and_is_right_then_is_served(tier, monkeypatch, group):
    copy = fetch.copy

    def torn(parts, *rest):
        copy(parts, *rest)
        part = parts[2 * 2 + group]  # of the third block
        part._landed[100:200] = 0
        part._digest = bytes(16)

    monkeypatch.setattr(loads, "copy", torn)
    assert read(tier, KEYS) == but()
    assert read(tier, KEYS[2:5]) == but(count=3)
    assert (tier.corrupt, tier.quarantined) == (0, 0)


def test_a_block_that_goes_before_it_is_copied_is_still_right_or_a_miss(tier, monkeypatch):
    at_first_copy(monkeypatch, lambda: changed(tier, lambda: tier.delete(KEYS[5:])))
    read(tier, KEYS)  # its pages are still as they were
    assert read(tier, KEYS) == but(5, 6, 7)
    assert tier.corrupt == 0


def test_a_block_whose_pages_another_has_by_now_is_a_miss_and_not_corrupt(tier, monkeypatch):
    others, freed = chain(range(100, 116), model=MODEL), pages_of(tier, KEYS[4:])

    def change():
        tier.delete(KEYS[4:])
        tier.put(items(others, MODEL))

    at_first_copy(monkeypatch, lambda: changed(tier, change))
    assert read(tier, KEYS) == [True] * 4 + [False] * 4
    assert pages_of(tier, others) == freed
    assert (tier.corrupt, tier.quarantined) == (0, 0)
    assert read(tier, KEYS[:4] + others) == but()


def test_a_block_that_lies_elsewhere_by_now_is_a_miss_once(tier, monkeypatch):
    others = chain(range(100, 116), model=MODEL)

    def change():
        tier.delete(KEYS[4:])
        tier.put(items(others, MODEL))
        tier.put(items(KEYS, MODEL))

    at_first_copy(monkeypatch, lambda: changed(tier, change))
    assert read(tier, KEYS) == [True] * 4 + [False] * 4
    assert read(tier, KEYS) == but()
    assert (tier.corrupt, tier.quarantined) == (0, 0)


def test_a_block_whose_pages_are_just_being_written_is_a_miss_and_not_corrupt(tier, monkeypatch):
    others, write = chain(range(100, 116), model=MODEL), tier._write
    written, read_it = threading.Event(), threading.Event()

    def slowly(placed):
        write(placed)
        written.set()
        read_it.wait(60)

    def change():
        changed(tier, lambda: tier.delete(KEYS[4:]))
        monkeypatch.setattr(tier, "_write", slowly)
        putting.append(other.submit(tier.put, items(others, MODEL)))
        assert written.wait(60)

    at_first_copy(monkeypatch, change)
    with ThreadPoolExecutor(1) as other:
        putting = []
        assert read(tier, KEYS) == [True] * 4 + [False] * 4
        read_it.set()
        putting[0].result()
    assert (tier.corrupt, tier.quarantined) == (0, 0)
    assert read(tier, KEYS[:4] + others) == but()


@pytest.mark.parametrize(
    ("most", "transactions"), [(1, 8), (2 * ROW_BYTES - 1, 8), (3 * ROW_BYTES, 3), (1 << 20, 1)]
)
def test_a_transaction_lasts_for_so_many_bytes(tier, monkeypatch, most, transactions):
    monkeypatch.setattr(disk, "READ_BYTES", most)
    reading, count = tier.access.reading, []
    monkeypatch.setattr(tier.access, "reading", lambda: count.append(1) or reading())
    assert read(tier, KEYS) == but()
    assert len(count) == transactions


def test_all_is_looked_up_before_anything_is_copied(tier, monkeypatch):
    steps, get, copy = [], tier.access.ledger.get, fetch.copy
    monkeypatch.setattr(tier.access.ledger, "get", lambda *a: steps.append("get") or get(*a))
    monkeypatch.setattr(loads, "copy", lambda *a: steps.append("copy") or copy(*a))
    assert read(tier, KEYS, range(2)) == but()
    assert steps == ["get"] * 8 + ["copy"]


def test_rows_that_do_not_fit_are_refused(tier):
    shape = MODEL.block_shape(4)[1:]
    for bad in (torch.zeros(2, 3, *shape), torch.zeros(2, 2, *shape, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="out must be contiguous"):
            tier.read_many(KEYS[:2], SOME, bad)
    with pytest.raises(ValueError, match="run of the 6 layers"):
        read(tier, KEYS, range(5, 7))


def room_of(nbytes, to):
    """Sevens, and among them `nbytes` zeros, aligned to `to` bytes and to no more."""
    room = np.full(nbytes + 4 * to, 7, np.uint8)
    start = -room.ctypes.data % (2 * to) + to
    room[start : start + nbytes] = 0
    return room, slice(start, start + nbytes)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(241, 0, MAPPED, False)
@example(1025, 0, MAPPED, False)
@example(1088, 0, MAPPED, False)
@example(1 << 16, 0, DIRECT, True)
@example((1 << 21) + 3, 0, DIRECT, True)
@example(241, 0, DIRECT, True)
@example((1 << 21) + 3, 1, DIRECT, True)
@given(
    st.integers(241, 5000) | st.sampled_from([1 << 16, (1 << 21) + 3]),
    st.sampled_from([0, 0, 1, 200, 500]),
    st.sampled_from([CACHED, DIRECT, MAPPED]),
    st.booleans(),
)
def test_the_compiled_hash_is_xxh3_and_short_files_have_none(
    tmp_path_factory, size, missing, way, in_place
):
    path = tmp_path_factory.mktemp("hash") / "file"  # on a disk, perhaps
    data = np.random.default_rng(size).integers(1, 256, 2 * 4096 + size, np.uint8)
    path.write_bytes(data.tobytes()[: len(data) - missing])
    room, place = room_of(size, 4096 if in_place else 16)
    landed, file = room[place], Values(path)
    if way == DIRECT:
        drop(path)
    mapped = np.memmap(path, np.uint8, "r")
    whole_pages = -(-mapped.nbytes // 4096) * 4096
    ways = Ways(file, mapped.ctypes.data if way == MAPPED else 0, whole_pages)
    if way == CACHED:
        ways.took(1, DIRECT)
    entry = Entry(KEYS[0], torch.bfloat16, torch.Size((1, 2, 1, 1, 1)), 1, RAW, 0, 0, 0, 1, (size,))
    part = Part(entry, 0, range(1), landed, 0, size, 1)
    fetch.copy([part], file, ways)
    right = landed.tobytes() == data.tobytes()[-size:]  # zeros behind the end are not
    assert right == (not missing)
    assert right == (part._digest == xxhash.xxh3_128_digest(data[-size:].data))
    assert set(np.delete(room, place)) == {7}
    ways.close()
    file.close()
