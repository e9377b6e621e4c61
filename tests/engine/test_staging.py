"""Batches of stored blocks come in order, each whole, while the next ones are read."""

import threading
from contextlib import contextmanager

import pytest

from engine import staging
from engine.hf import HFModel
from engine.staging import AHEAD, Placed, Staging
from kvstore import layout
from kvstore.block import KVBlock
from kvstore.disk import DiskTier
from kvstore.store import TieredStore
from tests.engine.families import build
from tests.kvstore.make import chain, content, identity, items, same

SIZE = 16
MODEL = HFModel(build("llama", num_hidden_layers=6))
SHAPE = MODEL.shape
IDENTITY = identity(
    num_layers=6, num_kv_heads=SHAPE.num_kv_heads, head_dim=SHAPE.head_dim,
    dtype=str(SHAPE.dtype).removeprefix("torch."),
)  # fmt: skip
KEYS = chain(range(20 * SIZE), model=IDENTITY, size=SIZE)
PLACED = [Placed(key, i * SIZE) for i, key in enumerate(KEYS)]
LAYER_BYTES = SHAPE.kv_bytes_per_token // 6 * SIZE


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Groups of two layers, and room for four blocks of them at a time."""
    monkeypatch.setattr(layout, "TARGET_BYTES", 2 * LAYER_BYTES)
    monkeypatch.setattr(staging, "STAGING_BYTES", (AHEAD + 1) * 4 * 2 * LAYER_BYTES)


@contextmanager
def stored(tmp_path, keys=KEYS):
    with TieredStore([DiskTier(tmp_path / "store", 1 << 28)]) as store:
        store.put(items(keys, IDENTITY))
        store.flush()
        yield store


def taken(source):
    """All that comes, copied, as it is valid until the next."""
    return [
        (group, staged.start, staged.data.clone(), staged.lost)
        for group in source.groups
        for _ in source.batches
        for staged in [source.take()]
    ]


def test_all_layers_of_all_blocks_come_in_order(tmp_path):
    with stored(tmp_path) as store:
        source = Staging(SHAPE, store, PLACED, {})
        all_of_it = taken(source)
        source.close()
    assert [group for group, *_ in all_of_it] == [
        group for group in (range(0, 2), range(2, 4), range(4, 6)) for _ in range(5)
    ]
    assert [start for _, start, *_ in all_of_it] == 3 * [0, 64, 128, 192, 256]
    for group, start, data, lost in all_of_it:
        assert not lost
        for key, row in zip(KEYS[start // SIZE :], data, strict=False):
            assert same(row, content(key, IDENTITY)[group.start : group.stop])


def test_so_many_are_read_ahead_and_no_more(tmp_path, monkeypatch):
    with stored(tmp_path) as store:
        begun, go_on, read = threading.Semaphore(0), threading.Semaphore(0), store.read_many

        def wait(*args):
            begun.release()
            assert go_on.acquire(timeout=60)
            return read(*args)

        monkeypatch.setattr(store, "read_many", wait)
        source = Staging(SHAPE, store, PLACED, {})
        for _ in range(AHEAD):  # before anybody asks
            assert begun.acquire(timeout=60)
        assert not begun.acquire(timeout=0.2)
        go_on.release(100)
        source.take()
        assert begun.acquire(timeout=60)
        assert not begun.acquire(timeout=0.2)
        source.close()


def test_what_is_taken_stays_while_the_next_ones_are_read(tmp_path):
    with stored(tmp_path) as store:
        source = Staging(SHAPE, store, PLACED, {})
        source.take()
        staged = source.take()
        before = staged.data.clone()
        for ahead in list(source._ahead):
            ahead.result()
        assert same(staged.data, before)
        source.close()


def test_what_is_gone_is_named_and_the_others_come(tmp_path):
    with stored(tmp_path) as store:
        store.delete(KEYS[18:])
        source = Staging(SHAPE, store, PLACED, {})
        lost = [staged[3] for staged in taken(source)]
        source.close()
    assert lost == 3 * [[], [], [], [], KEYS[18:]]


def test_what_was_computed_is_not_read(tmp_path):
    with stored(tmp_path, KEYS[:8]) as store:
        computed = {key: KVBlock(content(key, IDENTITY)) for key in KEYS[8:]}
        source = Staging(SHAPE, store, PLACED, computed)
        for group, start, data, lost in taken(source):
            assert not lost
            for key, row in zip(KEYS[start // SIZE :], data, strict=False):
                assert same(row, content(key, IDENTITY)[group.start : group.stop])
        source.close()


def test_a_gap_and_a_block_of_another_size_begin_a_batch(tmp_path):
    last = chain(range(5), model=IDENTITY, size=5)
    placed = [*PLACED[:3], *PLACED[4:6], Placed(last[0], 96)]
    with stored(tmp_path, [*KEYS, *last]) as store:
        source = Staging(SHAPE, store, placed, {})
        found = [(start, data.shape[0], data.shape[4]) for _, start, data, _ in taken(source)]
        source.close()
    assert found == 3 * [(0, 3, SIZE), (64, 2, SIZE), (96, 1, 5)]


def test_an_error_of_a_read_is_that_of_every_take_behind_it(tmp_path, monkeypatch):
    with stored(tmp_path) as store:
        read = store.read_many

        def fail(keys, layers, out):
            if layers.start == 2:
                raise MemoryError("none left")
            return read(keys, layers, out)

        monkeypatch.setattr(store, "read_many", fail)
        source = Staging(SHAPE, store, PLACED, {})
        for _ in source.batches:
            source.take()
        for _ in range(3):
            with pytest.raises(MemoryError, match="none left"):
                source.take()
        source.close()


def test_without_blocks_there_is_nothing_to_take(tmp_path):
    with stored(tmp_path) as store:
        source = Staging(SHAPE, store, [], {})
        assert source.batches == []
        source.close()
