"""Deleting blocks by name: gone from every tier, at once and for good."""

import threading
import time
from contextlib import suppress

import pytest

from kvstore.block import Kind
from kvstore.codecs.codec import byte_view
from kvstore.disk import entry
from kvstore.disk.access import Access
from kvstore.errors import StoreError
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, items, right
from tests.kvstore.stored import values_file
from tests.kvstore.test_store import opened

TABLE = 4096 // 512  # a block of the file system, in units of st_blocks
KEEP = chain(range(100, 140))
GONE = chain(range(30), kind=Kind.CHUNK, warmup=b"warm")  # 8 blocks, the last one ragged


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.mark.parametrize("host", [0, 100])
def test_deleted_blocks_are_in_no_tier_and_others_stay(path, host):
    with opened(path, host=host) as store:
        store.put(items(KEEP) + items(GONE))
        assert store.delete(GONE) == len(GONE) * (2 if host else 1)
        assert store.lookup(GONE) == 0
        assert all(store.get(key) is None for key in GONE)
        assert not any(key in store or key.digest in store for key in GONE)
        assert all(key in store and key.digest in store for key in KEEP)
        assert store.lookup(KEEP) == len(KEEP)
        assert store.audit().clean
    with opened(path) as store:
        assert store.lookup(GONE) == 0
        assert all(right(store.get(key), key) for key in KEEP)


def test_what_waits_to_be_written_does_not_come_back(path, monkeypatch):
    with opened(path, host=0) as store:
        level, goes = store._levels[0], threading.Event()
        insert = level.insert
        monkeypatch.setattr(level, "insert", lambda *given: goes.wait() and insert(*given))
        store.put(items(GONE))
        timer = threading.Timer(0.05, goes.set)
        timer.start()
        store.delete(GONE)
        store.flush()
        assert store.lookup(GONE) == 0


@pytest.mark.parametrize("everything", [False, True], ids=["deleted", "cleared"])
def test_what_is_on_its_way_into_memory_does_not_come_back(path, monkeypatch, everything):
    with opened(path, host=0) as store:
        store.put(items(GONE))
    with opened(path, host=100) as store:
        reads, goes = threading.Event(), threading.Event()
        get = store._sources.get

        def slow(key):
            block = get(key)
            reads.set()
            assert goes.wait(10)
            return block

        monkeypatch.setattr(store._sources, "get", slow)
        reader = threading.Thread(target=store.promote, args=(GONE[:1],))
        going = (store.clear,) if everything else (store.delete, GONE)
        deleter = threading.Thread(target=going[0], args=going[1:])
        reader.start()
        assert reads.wait(10)
        deleter.start()
        while deleter.is_alive() and not store._passage._going:
            time.sleep(0.001)
        goes.set()
        reader.join(10)
        deleter.join(10)
        store.put(items(GONE[1:2]))
        store.flush()
        assert store.resting(GONE) == [None] * len(GONE)


def test_a_deletion_that_is_interrupted_bans_nothing(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with opened(path, host=0) as store:
        with store._passage.carrying(), monkeypatch.context() as patched:
            patched.setattr(store._passage._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.delete(GONE)
        store.put(items(GONE))
        store.flush()
        assert store.lookup(GONE) == len(GONE)


def test_a_carrier_that_was_interrupted_keeps_no_deletion_waiting(path, monkeypatch):
    monkeypatch.setattr("kvstore.passage.WAIT_S", 0.01)
    with opened(path, host=0) as store:
        store.put(items(GONE))
        lost = store._passage.carrying()
        lost.__enter__()
        deleter = threading.Thread(target=store.delete, args=(GONE,), daemon=True)
        deleter.start()
        deleter.join(0.1)
        assert deleter.is_alive()
        del lost  # with what an interrupt had left of it
        deleter.join(10)
        assert not deleter.is_alive()
        assert store.lookup(GONE) == 0


def test_what_was_offered_to_the_disk_before_others_heard_of_it_does_not_come_back(path):
    with opened(path, host=0) as store:
        writer, deleting, offered = store._moves.writer, store._passage.deleting, []
        write = writer._write

        def slow(batch):
            time.sleep(0.2)
            write(batch)

        def late(digests):
            if not offered:  # by somebody who carries blocks, and is done with it
                writer.offer(items(GONE))
            offered.append(digests)
            return deleting(digests)

        writer._write, store._passage.deleting = slow, late
        store.delete(GONE)
        store.flush()
        assert store.resting(GONE) == [None] * len(GONE)


def test_a_pinned_block_can_be_deleted(path):
    with opened(path) as store:
        store.put(items(GONE))
        with store.pin(GONE):
            store.delete(GONE)
            assert store.lookup(GONE) == 0
        store.put(items(GONE))
        assert store.lookup(GONE) == len(GONE)


def test_books_are_right_after_a_deletion(path):
    with opened(path) as store:
        store.put(items(KEEP))
        store.flush()
        before = {name: tier.used_bytes for name, tier in store.stats().tiers.items()}
        store.put(items(GONE))
        store.delete(GONE)
        tiers = store.stats().tiers
        assert {name: tier.used_bytes for name, tier in tiers.items()} == before
        assert {tier.blocks for tier in tiers.values()} == {len(KEEP)}


def test_what_was_never_there_can_be_deleted(path):
    with opened(path) as store:
        store.put(items(KEEP))
        assert store.delete(GONE) == 0
        assert store.delete([]) == 0
        assert store.lookup(KEEP) == len(KEEP)


def test_a_store_of_memory_alone_deletes_too():
    with TieredStore([HostTier(1 << 20)]) as store:
        store.put(items(GONE))
        assert store.delete(GONE[4:]) == 4
        assert store.lookup(GONE) == 4


@pytest.mark.parametrize("host", [0, 100])
def test_what_rests_on_a_deleted_block_goes_too(path, host):
    with opened(path, host=host) as store:
        store.put(items(KEEP))
        assert store.delete([KEEP[3].digest]) == (2 if host else 1)
        assert {tier.blocks for tier in store.stats().tiers.values()} == {3}
        assert all(right(store.get(key), key) for key in KEEP[:3])
        assert store.audit().clean


def test_a_child_that_came_to_memory_before_its_parent_goes_with_it():
    with TieredStore([HostTier(1 << 20)]) as store:
        for item in reversed(items(KEEP[:3])):
            store._levels[0].tier.put([item])
        assert store.delete([KEEP[0]]) == 1
        assert store.stats().tiers["host"].used_bytes == 0


def test_what_rests_on_a_block_that_only_the_disk_has_goes_from_memory_too(path):
    with opened(path) as store:
        store.put(items(KEEP))
        store.flush()
        memory = store._levels[0]
        memory.tier.delete([KEEP[0]])  # as after a restart
        assert store.resting(KEEP[:2]) == ["disk", "host"]
        assert store.delete([KEEP[0]]) == 1
        assert not any(key in store for key in KEEP)
        assert len(memory._ranks) == 0


@pytest.mark.parametrize("how", ["clear", "delete", "delete the last"])
def test_what_was_deleted_can_be_read_from_the_file_no_more(path, how):
    keys = KEEP[5:] if how == "delete the last" else KEEP
    secrets = [bytes(byte_view(block.data)[:64]) for _, block in items(keys)]
    with opened(path, host=0) as store:
        store.put(items(KEEP))
        store.flush()
        values, before = values_file(path), values_file(path).stat().st_blocks
        assert all(secret in values.read_bytes() for secret in secrets)
        store.clear() if how == "clear" else store.delete(keys[:1])
        assert not any(secret in values.read_bytes() for secret in secrets)
        assert values.stat().st_blocks <= before // 2 + TABLE  # ext4 may note holes in one more
        store.put(items(KEEP))
        store.flush()
        assert all(right(store.get(key), key) for key in KEEP)
        assert store.audit().clean


def test_a_deletion_that_was_killed_or_came_late_leaves_nothing_in_the_file(path, monkeypatch):
    secrets = [bytes(byte_view(block.data)[:64]) for _, block in items(KEEP)]
    with opened(path, host=0) as store:
        store.put(items(KEEP))
        store.flush()
        with monkeypatch.context() as killed:  # behind the commit; an eviction ends there, too
            killed.setattr(Access, "give_back", broken)
            with suppress(StoreError):
                store._levels[0].tier.delete(KEEP[:1])
        assert store.lookup(KEEP) == 0
        values = values_file(path)
        assert all(secret in values.read_bytes() for secret in secrets)
        assert store.delete(KEEP) == 0
        assert not any(secret in values.read_bytes() for secret in secrets)


def test_a_write_that_failed_keeps_no_block_from_being_deleted(path, monkeypatch):
    with opened(path) as store:
        store.put(items(GONE))
        store.flush()
        with monkeypatch.context() as failing:
            failing.setattr(store._levels[1].tier, "put", broken)
            store.put(items(KEEP))
            assert store.delete(GONE) == 2 * len(GONE)
            with pytest.raises(StoreError, match="broken"):  # who wants to know, is told
                store.flush()
        assert store.lookup(GONE) == 0


def broken(*_):
    raise StoreError("broken")


def test_a_deletion_reads_each_entry_twice(path, monkeypatch):
    many, read = chain(range(100, 100 + 4 * 64)), []
    with opened(path) as store:
        store.put(items(many))
        store.flush()
        unpack = entry.unpack
        monkeypatch.setattr(entry, "unpack", lambda *args: read.append(args) or unpack(*args))
        assert store.delete(many[-1:]) == 2
        # to find what rests on it in any tier, and then in the transaction; a few for their own
        assert len(read) < 2 * len(many) + 8
        assert store.audit().clean
