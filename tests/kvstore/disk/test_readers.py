"""Who keeps freed pages from being used again is found, and ended if dead."""

import fcntl
import os
import signal

import pytest

from kvstore.disk import readers
from kvstore.disk.readers import Reader, parsed
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from tests.kvstore.crash import forked
from tests.kvstore.make import chain, identity, items

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def put(tier, number):
    tier.put(items(chain(range(100 * number, 100 * number + 4), model=MODEL), MODEL))


def read_for_ever(path, pipe):
    with DiskTier(path, 1 << 30).access.reading():
        os.write(pipe, b"!")
        signal.pause()


def claim_number(path, pipe):
    """Do as a process in another container does that has its parent's number."""
    with (path / "lock.mdb").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, os.getppid())
        os.write(pipe, b"!")
        signal.pause()


def reading(path, what=read_for_ever):
    """A process in the midst of a read."""
    began, pipe = os.pipe()
    pid = forked(what, path, pipe)
    os.close(pipe)
    assert os.read(began, 1) == b"!"
    os.close(began)
    return pid


def test_a_dead_reader_is_ended_by_the_next_change(path):
    DiskTier(path, 1 << 30).close()
    pid = reading(path)
    tier = DiskTier(path, 1 << 30)
    for number in range(5):
        put(tier, number)
    assert tier.readers.lag == 5
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    put(tier, 5)
    assert tier.readers.lag == 0
    tier.close()


def test_a_reader_that_hangs_is_named_once(path, monkeypatch, caplog):
    monkeypatch.setattr(readers, "PATIENCE", 2)
    DiskTier(path, 1 << 30).close()
    pid = reading(path)
    tier = DiskTier(path, 1 << 30)
    try:
        for number in range(6):
            put(tier, number)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = [x.getMessage() for x in caplog.records if "has been reading" in x.message]
    assert len(said) == 1
    assert f"process {pid} " in said[0]
    tier.close()


def test_processes_of_one_number_in_two_containers_are_told_of_it(path):
    DiskTier(path, 1 << 30).close()
    pid = reading(path, claim_number)
    try:
        with pytest.raises(StoreError, match="if containers share the folder, one pid namespace"):
            DiskTier(path, 1 << 30)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    DiskTier(path, 1 << 30).close()


def test_a_table_of_readers_is_understood():
    table = "    pid     thread     txnid\n  41 7f00 -\n  42 7f01 1234\n   43 7f02 99\n"
    assert parsed(table) == [Reader(42, 1234), Reader(43, 99)]
    assert parsed("(no active readers)\n") == []
