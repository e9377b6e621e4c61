"""The file of all KV: what is written where, and what is read back."""

import os

import numpy as np
import pytest

from kvstore.disk import values as module
from kvstore.disk.values import PAGE_BYTES, Values, pages_of
from kvstore.errors import CorruptRecord
from kvstore.record import HEADER_BYTES

HEADER = bytes(range(HEADER_BYTES))
SIZES = [1, 240, 4096, 4097, 3 * 4096, 100_000]


@pytest.fixture
def values(tmp_path):
    (tmp_path / "values-1").touch()
    values = Values(tmp_path / "values-1")
    yield values
    values.close()


def payload(nbytes):
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_record_fills_its_pages_and_no_other(values, nbytes):
    pages = pages_of(nbytes)
    os.pwrite(values.handle, b"\xff" * (pages + 4) * PAGE_BYTES, 0)
    values.write(2, HEADER, payload(nbytes))
    values.sync()
    data = values.path.read_bytes()
    start = 2 * PAGE_BYTES
    end = start + PAGE_BYTES + nbytes
    assert data[start : start + HEADER_BYTES] == HEADER
    assert not any(data[start + HEADER_BYTES : start + PAGE_BYTES])
    assert data[start + PAGE_BYTES : end] == payload(nbytes).tobytes()
    assert not any(data[end : (2 + pages) * PAGE_BYTES])
    assert data[: 2 * PAGE_BYTES] == b"\xff" * 2 * PAGE_BYTES
    assert data[(2 + pages) * PAGE_BYTES :] == b"\xff" * 2 * PAGE_BYTES
    assert bytes(values.record(2, nbytes)) == HEADER + payload(nbytes).tobytes()


@pytest.mark.parametrize("most", [1000, 4096, 5000])
def test_writes_that_do_a_part_are_continued(values, monkeypatch, most):
    whole = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, parts, at: whole(fd, [memoryview(b"".join(parts))[:most]], at)
    )
    values.write(1, HEADER, payload(20_000))
    assert bytes(values.record(1, 20_000)) == HEADER + payload(20_000).tobytes()


def test_a_file_grows_by_what_is_written_and_its_map_with_it(values):
    assert values.pages == 0
    values.write(5, HEADER, payload(5000))
    assert values.pages == 5 + pages_of(5000)
    assert values.map_end - values.map_start == module.MAP_BYTES


def test_what_is_behind_the_end_is_no_record(values):
    values.write(0, HEADER, payload(5000))
    with pytest.raises(CorruptRecord, match="ends before the record in page 1"):
        values.record(1, 5000)


def test_without_the_call_that_begins_early_all_is_written(values, monkeypatch):
    monkeypatch.setattr(module, "_LIBC", object())
    values.write(1, HEADER, payload(20_000))
    assert bytes(values.record(1, 20_000)) == HEADER + payload(20_000).tobytes()
    monkeypatch.undo()  # for closing


def test_a_hole_gives_the_disk_back_and_leaves_the_rest(values):
    for page in (0, 40, 80):
        values.write(page, HEADER, payload(100_000))
    values.sync()
    before = values.disk_bytes
    assert values.punch(40, 20) == before - values.disk_bytes == 20 * PAGE_BYTES
    assert values.punch(40, 20) == 0
    assert bytes(values.record(0, 100_000)) == HEADER + payload(100_000).tobytes()
    assert bytes(values.record(80, 100_000)) == HEADER + payload(100_000).tobytes()
    assert not any(values.record(40, 50_000))


def test_a_file_system_without_holes_keeps_all(values, monkeypatch):
    values.write(0, HEADER, payload(100_000))
    values.sync()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_LIBC", object())
        assert values.punch(0, 20) == 0
    assert bytes(values.record(0, 100_000)) == HEADER + payload(100_000).tobytes()
