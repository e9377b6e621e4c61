"""Blocks on disk: bounded, private and temporary; damage and a full disk are errors."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from kvstore.errors import CorruptRecord, StoreError
from kvstore.pool.spill import BATCH_BYTES, Spill
from tests.kvstore.pool.spilling import LARGE, all_ids, disk_bytes, fill, filled, made, right


def test_the_file_stays_bounded_however_often_blocks_change(tmp_path):
    with closing(made(tmp_path, LARGE, slots=1, blocks=8)) as pool:
        for seed in range(30):
            filled(pool, 8 * 16, seed)[0].close()
        (file,) = tmp_path.glob("spill/.headrace-spill-*/data.mdb")
        assert file.stat().st_size < disk_bytes(LARGE, 8) * 1.5 + (1 << 20)


def test_more_than_a_transaction_holds_is_written_in_several(tmp_path):
    with closing(Spill(tmp_path, 1 << 30)) as spill:
        values = [np.full(1 << 20, i, np.uint8) for i in range(2 * BATCH_BYTES // (1 << 20) + 3)]
        spill.write(list(enumerate(values)))
        back = [np.empty(1 << 20, np.uint8) for _ in values]
        spill.read(list(enumerate(back)))
        assert all((b == i).all() for i, b in enumerate(back))


def test_damage_on_disk_is_an_error_and_everything_else_is_still_right(tmp_path):
    pool = made(tmp_path, LARGE, slots=2)
    lease, data = filled(pool, 160)
    (file,) = tmp_path.glob("spill/.headrace-spill-*/data.mdb")
    place = pool._spill._places[int(lease.table[0])]  # of layer 0
    with file.open("r+b") as handle:
        handle.seek(place.page * 4096 + 16 + 5000)
        handle.write(b"damage")
    for ids in ([[0], [0]], [[0, 20], [40, 0]]):  # one reader, several readers
        with pytest.raises(CorruptRecord, match="is not what was written there"):
            lease.gather(0, torch.tensor(ids))
    assert right(lease, 0, all_ids(pool, 160)[:, 16:], data)
    assert right(lease, 1, all_ids(pool, 160), data)
    lease.close()
    again, data = filled(pool, 16)
    assert right(again, 0, all_ids(pool, 16), data)
    again.close()
    pool.close()


def test_a_file_that_was_cut_short_is_an_error(tmp_path):
    with closing(Spill(tmp_path, 1 << 20)) as spill:
        values = [np.full(50_000, i, np.uint8) for i in range(3)]
        spill.write(list(enumerate(values)))
        os.truncate(spill.folder / "data.mdb", 4096 * spill._places[2].page + 100)
        out = [np.empty(50_000, np.uint8) for _ in values]
        for wanted in ([2], [0, 1, 2]):
            with pytest.raises(StoreError, match="was cut short: block 2 is lost"):
                spill.read([(i, out[i]) for i in wanted])
        assert all((out[i] == i).all() for i in range(2))


def test_after_an_error_no_reader_still_writes_to_the_buffers(tmp_path, monkeypatch):
    finished = []

    def fetch(spill, number, out):
        if number == 0:
            raise CorruptRecord("block 0")
        threading.Event().wait(0.1)  # a slow disk
        finished.append(number)

    monkeypatch.setattr(Spill, "_fetch", fetch)
    with closing(Spill(tmp_path, 1 << 20)) as spill:
        with pytest.raises(CorruptRecord):
            spill.read([(i, np.empty(4, np.uint8)) for i in range(3)])
        assert sorted(finished) == [1, 2]


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    pool = made(tmp_path, LARGE, slots=2)
    lease, data = filled(pool, 32)
    failed, other = pool.lease(), pool.lease()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"lower spill_bytes, or choose another spill_path"):
            fill(failed, pool, 32, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for layer in range(2):
        assert right(lease, layer, all_ids(pool, 32), data)
    more = fill(other, pool, 32, seed=2)
    assert right(other, 0, all_ids(pool, 32), more)
    assert right(lease, 0, all_ids(pool, 32), data)
    for each in (lease, failed, other):
        each.close()
    pool.close()


class Panicking:
    """An environment whose last commit failed in its last step: LMDB begins no other."""

    def __init__(self, env):
        self.close = env.close

    def begin(self, **_):
        raise lmdb.PanicError("mdb_txn_begin")


def test_after_a_commit_that_failed_in_its_last_step_blocks_are_read_and_written(tmp_path):
    values = [np.full(size, size % 251, np.uint8) for size in (1 << 20, 100)]
    with closing(Spill(tmp_path, 1 << 24)) as spill:
        for number, value in enumerate(values):
            spill.write([(number, value)])
        for number, value in enumerate(values):
            spill._env = Panicking(spill._env)
            spill.read([(number, back := np.zeros_like(value))])
            assert np.array_equal(back, value)
            spill.write([(2, value)])
            spill.read([(2, back := np.zeros_like(value))])
            assert np.array_equal(back, value)


def test_the_folder_is_private_and_goes_when_the_pool_is_closed(tmp_path):
    pool = made(tmp_path / "a" / "b")
    (folder,) = tmp_path.glob("a/b/spill/.headrace-spill-*/")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o077 for p in folder.iterdir()} == {0}
    pool.close()
    pool.close()
    assert not folder.exists()


def test_folders_of_dead_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from kvstore.pool.spill import Spill
spill = Spill(Path({str(tmp_path)!r}), 1 << 20)
print(spill.folder, flush=True)
sys.stdin.readline()
os._exit(1)
"""
    run = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(run, stdin=pipe, stdout=pipe, text=True) as child:
        theirs = Path(child.stdout.readline().strip())
        for mine in (tmp_path / "spill-of-a-user", tmp_path / ".headrace-spill-copied"):
            mine.mkdir()
            for name in ("owner", "precious.doc"):
                (mine / name).touch()
        with closing(Spill(tmp_path, 1 << 20)) as ours, closing(Spill(tmp_path, 1 << 20)):
            assert theirs.is_dir()
            child.communicate("\n")
            assert theirs.is_dir()
            with closing(Spill(tmp_path, 1 << 20)):
                assert not theirs.exists()
                assert ours.folder.is_dir()
    assert (tmp_path / "spill-of-a-user" / "precious.doc").is_file()
    assert (tmp_path / ".headrace-spill-copied" / "precious.doc").is_file()


def test_threads_open_and_close_their_own_below_one_path(tmp_path):
    wrong = []

    def work():
        for _ in range(40):
            try:
                Spill(tmp_path, 1 << 20).close()
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.listdir(tmp_path) == ["spill.lock"]


def test_a_folder_that_something_has_cleaned_up_is_closed_all_the_same(tmp_path):
    spill, before = Spill(tmp_path, 1 << 20), len(os.listdir("/proc/self/fd"))
    shutil.rmtree(spill.folder)
    spill.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_what_was_killed_while_it_removed_its_folder_is_removed(tmp_path):
    half = tmp_path / ".headrace-spill-half"
    half.mkdir()
    (half / "data.mdb").touch()
    with closing(Spill(tmp_path, 1 << 20)):
        assert not half.exists()


def test_a_process_that_ends_leaves_nothing_even_if_it_forked_and_closed_nothing(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from kvstore.errors import StoreError
from kvstore.pool.spill import Spill
spill = Spill(Path({str(tmp_path)!r}), 1 << 20)
pid = os.fork()
if pid == 0:
    try:
        spill.write([])
    except StoreError as error:
        print(error)
    sys.exit(0)
os.waitpid(pid, 0)
print(spill.folder.is_dir())
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    lines = out.stdout.splitlines()
    assert lines == ["the spill was opened before a fork: open one in the child", "True"], (
        out.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["spill.lock"]


def test_a_path_that_cannot_be_used_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="choose another spill_path"):
        Spill(tmp_path / "file", 1 << 20)
