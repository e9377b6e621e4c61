"""A store that is closed, or was not quite opened: nothing is read behind its end."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from kvstore.config import StoreConfig
from kvstore.disk.readers import parsed
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from kvstore.store import TieredStore
from tests.kvstore.crash import forked
from tests.kvstore.make import chain, identity, items, right

KEYS = chain(range(40))


@pytest.fixture
def config(tmp_path):
    return StoreConfig(host_bytes=0, disk_path=str(tmp_path / "store"))


@pytest.fixture
def filled(config):
    with TieredStore.open(config) as store:
        store.put(items(KEYS))
    return config


CALLS = {
    "lookup": lambda s: s.lookup(KEYS),
    "get": lambda s: s.get(KEYS[0]),
    "read": lambda s: s.read(KEYS[0], range(1)),
    "read_many": lambda s: s.read_many(KEYS, range(1), torch.empty(10, 1, 2, 2, 4, 8).bfloat16()),
    "empty": lambda s: s.empty((2, 3), torch.bfloat16),
    "pin": lambda s: s.pin(KEYS),
    "put": lambda s: s.put(items(KEYS)),
    "flush": lambda s: s.flush(),
    "settle": lambda s: s.settle(),
    "limit": lambda s: s.limit(b"tag", 100),
    "promote": lambda s: s.promote(KEYS),
    "audit": lambda s: s.audit(),
    "stats": lambda s: s.stats(),
    "ages": lambda s: s.ages(),
    "in": lambda s: KEYS[0] in s,
    "resting": lambda s: s.resting(KEYS),
    "delete": lambda s: s.delete(KEYS),
    "clear": lambda s: s.clear(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_store_says_so(filled, name):
    store = TieredStore.open(filled)
    CALLS[name](store)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="the store is closed"):
        CALLS[name](store)


def test_closing_waits_for_those_that_read_and_lets_nobody_in(filled, monkeypatch):
    store, reads, goes = TieredStore.open(filled), threading.Event(), threading.Event()
    tier, found = store._levels[0].tier, []
    get = tier.get

    def slow(key):
        reads.set()
        assert goes.wait(10)
        return get(key)

    monkeypatch.setattr(tier, "get", slow)
    reader = threading.Thread(target=lambda: found.append(store.get(KEYS[0])))
    closer = threading.Thread(target=store.close)
    reader.start()
    assert reads.wait(10)
    closer.start()
    while not store.gate._shut:
        time.sleep(0.001)
    with pytest.raises(StoreError, match="closed"):
        store.get(KEYS[1])
    assert closer.is_alive()
    goes.set()
    reader.join(10)
    closer.join(10)
    assert right(found[0], KEYS[0])


@pytest.mark.parametrize("call", ["get", "read_many", "promote"])
def test_threads_that_use_a_store_while_it_is_closed_see_an_error_or_what_is_right(filled, call):
    out = torch.empty(10, 3, *identity().block_shape(4)[1:], dtype=torch.bfloat16)
    calls = {
        "get": lambda s: right(s.get(KEYS[3]), KEYS[3]),
        "read_many": lambda s: all(s.read_many(KEYS, range(3), torch.empty_like(out))),
        "promote": lambda s: s.promote(KEYS) == 10,
    }
    for _ in range(10):
        store, wrong, ready = TieredStore.open(filled), [], threading.Barrier(4)

        def use(store=store, wrong=wrong, ready=ready):
            ready.wait(10)
            try:
                while True:
                    if not calls[call](store):
                        wrong.append("a miss")
            except StoreError as error:
                if "closed" not in str(error):
                    wrong.append(error)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        ready.wait(10)
        time.sleep(0.01)
        store.close()
        for thread in threads:
            thread.join(10)
        assert not wrong


def test_a_deletion_that_is_under_way_is_done_before_the_store_is_closed(filled, monkeypatch):
    store, waits, goes = TieredStore.open(filled), threading.Event(), threading.Event()
    settle = store._writer.settle

    def slow():
        waits.set()
        assert goes.wait(10)
        settle()

    monkeypatch.setattr(store._writer, "settle", slow)
    deleted = []
    deleter = threading.Thread(target=lambda: deleted.append(store.delete(KEYS)))
    closer = threading.Thread(target=store.close)
    deleter.start()
    assert waits.wait(10)
    closer.start()
    while not store.gate._shut:
        time.sleep(0.001)
    goes.set()
    deleter.join(10)
    closer.join(10)
    assert deleted == [len(KEYS)]
    with TieredStore.open(filled) as store:
        assert store.lookup(KEYS) == 0


def test_closing_that_is_interrupted_can_be_done_again_and_a_second_one_waits(filled, monkeypatch):
    store = TieredStore.open(filled)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store.gate._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.close()
    assert store.lookup(KEYS) == len(KEYS)
    closers = [threading.Thread(target=store.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(10)
    with TieredStore.open(filled) as again:
        assert again.lookup(KEYS) == len(KEYS)


def test_who_was_interrupted_inside_keeps_nobody_from_closing(filled):
    store = TieredStore.open(filled)
    store.gate.enter()  # and an interrupt came before it could leave
    gone = threading.Thread(target=store.gate.enter)
    gone.start()
    gone.join(10)
    closer = threading.Thread(target=store.close, daemon=True)
    store.gate.leave()
    closer.start()
    closer.join(10)
    assert not closer.is_alive()


def test_a_fork_closes_what_other_threads_were_using(filled):
    store, inside, goes = TieredStore.open(filled), threading.Event(), threading.Event()

    def use():
        store.gate.enter()
        inside.set()
        assert goes.wait(30)
        store.gate.leave()

    user = threading.Thread(target=use)
    user.start()
    assert inside.wait(10)
    pid = os.fork()
    if not pid:
        threading.Timer(20, os._exit, (1,)).start()
        try:
            store.gate.shut()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    goes.set()
    user.join(10)
    store.close()


def in_child(store, config):
    """What a forked child may do with its parent's store: close it, and open its own."""
    threading.Timer(20, os._exit, (1,)).start()
    for call in CALLS.values():
        with pytest.raises(StoreError, match="before a fork"):
            call(store)
    store.close()
    with TieredStore.open(config) as own:
        assert own.lookup(KEYS) == len(KEYS)


def test_a_forked_child_may_close_a_store_and_harms_nobody(filled):
    store = TieredStore.open(filled)
    assert store.lookup(KEYS) == len(KEYS)
    locked, goes = threading.Event(), threading.Event()

    def work():
        with store._writer._changed:
            locked.set()
            assert goes.wait(30)

    worker = threading.Thread(target=work)
    worker.start()
    assert locked.wait(10)
    assert os.waitpid(forked(in_child, store, filled), 0)[1] == 0
    goes.set()
    worker.join(10)
    assert all(right(store.get(key), key) for key in KEYS)
    store.close()


def test_a_forked_child_that_closes_a_store_ends_no_read_of_its_parent(filled):
    def in_child():
        store.close()
        with pytest.raises(StoreError, match="in use when this process was forked"):
            TieredStore.open(filled)

    with TieredStore.open(filled) as store:
        access = store._levels[0].tier.access
        with access.reading():
            before = access.env.lmdb.readers()
            assert os.waitpid(forked(in_child), 0)[1] == 0
            assert access.env.lmdb.readers() == before
            assert parsed(before)


def test_closing_waits_for_no_allowance_of_the_disk(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    store = TieredStore([tier], write_bytes_per_s=1000)
    store._writer._allowance.spend(1 << 20)  # in debt for a quarter of an hour
    store.put(items(KEYS))
    flusher = threading.Thread(target=store.flush)
    flusher.start()
    start = time.monotonic()
    store.close()
    flusher.join(10)
    assert time.monotonic() - start < 10
    with TieredStore([DiskTier(tmp_path / "store", 1 << 30)]) as store:
        assert store.lookup(KEYS) == len(KEYS)


def test_what_was_opened_for_a_store_that_cannot_be_is_closed(filled, monkeypatch):
    def unreadable(self):
        raise StoreError("the tables cannot be read")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(DiskTier, "residents", unreadable)
        with pytest.raises(StoreError, match="cannot be read") as kept:
            TieredStore.open(filled)
    assert len(os.listdir("/proc/self/fd")) == before, kept
    with TieredStore.open(filled) as store:
        assert store.lookup(KEYS) == len(KEYS)


def test_the_number_of_a_closed_file_is_not_used_again(filled):
    tier = DiskTier(Path(filled.disk_path), 1 << 30)
    values = tier.access.env.values
    tier.close()
    assert values.handle == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        values.punch(0, 1)
