"""Others' deaths and changes, jumps of the clock and the loss of the folder cost misses at most."""

import pytest

from tests.kvstore.faults.others import FATES
from tests.kvstore.faults.overtaken import FATES as OVERTAKEN
from tests.kvstore.faults.overtaken import WAYS
from tests.kvstore.faults.run import campaigns

NAMES = ["readers_killed", "two_writers", "overtaken", "clocks", "removed"]
MEMORY_BYTES = 512 << 20  # of one process, with torch


def run(folder, rounds, seed):
    found = campaigns(NAMES, folder, rounds, seed)
    assert all(each["rounds"] >= rounds for each in found.values())
    assert all(each["most_bytes"] < MEMORY_BYTES for each in found.values())
    assert {name.split(":")[0] for name in found["removed"]["outcomes"]} == set(FATES)
    reads = found["overtaken"]["outcomes"]
    assert {name.split(":")[0] for name in reads} == {f"{f}, {w}" for f in OVERTAKEN for w in WAYS}
    assert {reads[f"taken, {way}: none"] > rounds // 4 for way in WAYS} == {True}
    assert found["removed"]["outcomes"]["read-only: then StoreError"] == rounds // len(FATES)


def test_dead_readers_other_writers_late_reads_clocks_and_lost_folders_do_no_harm(tmp_path):
    run(tmp_path, len(FATES), seed=1)


@pytest.mark.slow
def test_hundreds_of_them_do_no_harm(tmp_path):
    run(tmp_path, 300, seed=2)
