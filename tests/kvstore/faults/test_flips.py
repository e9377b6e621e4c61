"""A byte of a store's files that changes, whichever it is, never makes a wrong KV."""

from itertools import pairwise

import pytest

from kvstore.disk.environment import files_of
from tests.kvstore.faults.bytemap import CHECKED, CLASSES, NOTE, SPARE, TABLES, ByteMap
from tests.kvstore.faults.children import ended
from tests.kvstore.faults.flips import made
from tests.kvstore.faults.run import campaign


def flipped(folder, flips, seed):
    found = campaign("flips", folder, flips, seed)
    assert found["rounds"] >= flips
    kinds = found["outcomes"]
    assert all(kinds[kind] >= flips // 50 for kind in (*CHECKED, *SPARE))
    assert kinds[NOTE] == flips // 50
    assert all(kinds[kind] == flips // 40 for kind in TABLES)
    assert kinds["branch: right"] < kinds["branch"]  # or they do not reach the file
    return kinds


def test_every_byte_of_the_files_belongs_to_one_class(tmp_path):
    assert ended(made, tmp_path / "store").code == 0
    data, values = (file.read_bytes() for file in files_of(tmp_path / "store"))
    spans = ByteMap(data, values).spans
    runs = sorted((start, end) for kind in CLASSES for start, end, _ in spans[kind])
    assert spans.keys() == set(CLASSES)
    assert runs[0][0] == 0
    assert runs[-1][1] == len(data) + len(values)
    assert all(a[1] == b[0] for a, b in pairwise(runs))


def test_thousands_of_flips_are_misses_or_nothing(tmp_path):
    flipped(tmp_path, 2000, seed=1)


@pytest.mark.slow
def test_a_hundred_thousand_flips_are_misses_or_nothing(tmp_path):
    found = flipped(tmp_path, 100_000, seed=2)
    assert found["tables walked: found"] > found["tables walked: silent"] / 2
