"""Batches of stored blocks come in order, each whole, while the next ones are read."""

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager

import pytest
import torch

from engine import loading, staging
from engine.cache import SequenceCache
from engine.loading import Loader
from engine.model.hf import HFModel
from engine.model.pieces import owners
from engine.recorder import Recorder
from engine.staging import AHEAD, Busy, Placed, Staging
from kvstore import layout
from kvstore.block import KVBlock
from kvstore.disk.tier import DiskTier
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
        source = Staging(SHAPE, store, PLACED, {}, Busy())
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
        source = Staging(SHAPE, store, PLACED, {}, Busy())
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
        source = Staging(SHAPE, store, PLACED, {}, Busy())
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
        source = Staging(SHAPE, store, PLACED, {}, Busy())
        lost = [staged[3] for staged in taken(source)]
        source.close()
    assert lost == 3 * [[], [], [], [], KEYS[18:]]


def test_what_was_computed_is_not_read(tmp_path):
    with stored(tmp_path, KEYS[:8]) as store:
        computed = {key: KVBlock(content(key, IDENTITY)) for key in KEYS[8:]}
        source = Staging(SHAPE, store, PLACED, computed, Busy())
        for group, start, data, lost in taken(source):
            assert not lost
            for key, row in zip(KEYS[start // SIZE :], data, strict=False):
                assert same(row, content(key, IDENTITY)[group.start : group.stop])
        source.close()


def test_a_gap_and_a_block_of_another_size_begin_a_batch(tmp_path):
    last = chain(range(5), model=IDENTITY, size=5)
    placed = [*PLACED[:3], *PLACED[4:6], Placed(last[0], 96)]
    with stored(tmp_path, [*KEYS, *last]) as store:
        source = Staging(SHAPE, store, placed, {}, Busy())
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
        source = Staging(SHAPE, store, PLACED, {}, Busy())
        for _ in source.batches:
            source.take()
        for _ in range(3):
            with pytest.raises(MemoryError, match="none left"):
                source.take()
        source.close()


def test_closed_it_waits_for_reads_and_gives_its_memory_back_at_once(tmp_path, monkeypatch):
    with stored(tmp_path) as store, ThreadPoolExecutor(1) as other:
        begun, go_on, read = threading.Semaphore(0), threading.Event(), store.read_many

        def wait(*args):
            begun.release()
            assert go_on.wait(60)
            return read(*args)

        monkeypatch.setattr(store, "read_many", wait)
        source = Staging(SHAPE, store, PLACED, {}, Busy())
        rooms = [weakref.ref(room) for room in source._rooms]
        assert begun.acquire(timeout=60)
        closed = other.submit(source.close)
        assert not wait_for([closed], timeout=0.2).done
        go_on.set()
        closed.result(timeout=60)
    gc.disable()
    try:
        del wait, closed
        monkeypatch.undo()
        assert [room() for room in rooms] == [None] * (AHEAD + 1)
    finally:
        gc.enable()


def test_busy_is_the_time_in_which_somebody_is(monkeypatch):
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(staging.time, "perf_counter", lambda: next(now))
    busy = Busy()
    with busy, busy:  # from 10 to 13
        pass
    with busy:
        pass
    assert busy.seconds == 4.0


def loader_of(store, **settings):
    cache = SequenceCache(SHAPE, 20 * SIZE)
    return Loader(MODEL, cache, store, PLACED, 20 * SIZE, **settings), cache


@pytest.mark.parametrize("paced", [False, True])
def test_reading_counts_as_loading_also_ahead_of_the_loop(tmp_path, monkeypatch, paced):
    with stored(tmp_path) as store:
        read = store.read_many
        monkeypatch.setattr(store, "read_many", lambda *args: (time.sleep(0.02), read(*args))[1])
        loader, _ = loader_of(store, paced=paced)
        for layer in range(6):
            loader.wait(layer)
            time.sleep(0.1)
        loader.cancel()
    assert loader.load_s > 15 / AHEAD * 0.02  # batches


def test_a_loader_that_is_cancelled_takes_no_more_batches(tmp_path, monkeypatch):
    begun, go_on, placed, place = threading.Event(), threading.Event(), [], Loader._place

    def slow(self, group, start, data):
        placed.append(start)
        begun.set()
        assert go_on.wait(20)
        place(self, group, start, data)

    monkeypatch.setattr(Loader, "_place", slow)
    with stored(tmp_path) as store:
        loader, _ = loader_of(store)
        assert begun.wait(20)
        threading.Timer(0.2, go_on.set).start()
        loader.cancel()
        with pytest.raises(CancelledError):
            loader.wait(1)
    assert len(placed) == 1


def test_what_could_not_be_placed_puts_no_other_layer_in_its_place(tmp_path, monkeypatch):
    placed, place = [], Loader._place

    def fail(self, group, start, data):
        if start == SIZE * 4 and group.start == 2:
            raise MemoryError("no room")
        placed.append((group, start))
        place(self, group, start, data)

    monkeypatch.setattr(Loader, "_place", fail)
    with stored(tmp_path) as store:
        loader, _ = loader_of(store)
        loader.wait(1)
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                loader.wait(2)
        with pytest.raises(RuntimeError, match="could not be placed"):
            loader.wait(4)
        loader.cancel()
    assert placed == [(range(0, 2), 64 * i) for i in range(5)] + [(range(2, 4), 0)]


def test_a_loader_puts_every_block_in_its_place(tmp_path):
    with stored(tmp_path) as store:
        loader, cache = loader_of(store)
        loader.result()
        loader.cancel()
    for i, layer in enumerate(owners(MODEL)):
        kv, table = cache.view(i, 20 * SIZE), loader.tables[layer.rope]
        k = torch.cat([content(key, IDENTITY)[i, 0] for key in KEYS], 1)
        assert same(kv.k, layer.rope.rotate(k, table))
        assert same(kv.v, torch.cat([content(key, IDENTITY)[i, 1] for key in KEYS], 1))


def test_without_blocks_there_is_nothing_to_take(tmp_path):
    with stored(tmp_path) as store:
        source = Staging(SHAPE, store, [], {}, Busy())
        assert source.batches == []
        source.close()


def test_a_layer_is_met_where_its_loading_ended_and_cancelling_waits_for_the_rest(
    tmp_path, monkeypatch
):
    """By a stream that is none: on a GPU what a loader launches runs beside the loop."""
    order = []

    class Beside:
        def __init__(self, device):
            self.inside = False

        @contextmanager
        def here(self):
            self.inside = True
            yield
            self.inside = False

        def mark(self):
            assert self.inside
            order.append("mark")
            return len(order)

        def meet(self, mark, made):
            assert all(x.shape[1] == 0 and x.untyped_storage().nbytes() for x in made)
            order.append(("met", mark))

        def settle(self):
            order.append("settled")

    monkeypatch.setattr(loading, "Side", Beside)
    with stored(tmp_path) as store:
        loader, _ = loader_of(store)
        loader.result()
        loader.cancel()
    marks = [i + 1 for i, what in enumerate(order) if what == "mark"]
    met = [what[1] for what in order if isinstance(what, tuple)]
    assert len(met) == SHAPE.num_layers
    assert sorted(set(met)) == marks
    assert order[-1] == "settled"


@pytest.mark.gpu
def test_loading_does_not_wait_for_what_the_loop_has_launched(tmp_path, monkeypatch):
    model, go_on = HFModel(build("llama", num_hidden_layers=6).to("cuda")), threading.Event()
    with stored(tmp_path) as store:
        read = store.read_many
        monkeypatch.setattr(store, "read_many", lambda *args: (go_on.wait(20), read(*args))[1])
        cache = SequenceCache(model.shape, 20 * SIZE)
        loader = Loader(model, cache, store, PLACED, 20 * SIZE)
        torch.cuda._sleep(1 << 33)  # some seconds
        busy = torch.cuda.current_stream().record_event()
        go_on.set()
        wait_for(loader._loads.values())
        assert loader.done()
        assert not busy.query()
        loader.result()
        last = cache.view(5, 20 * SIZE)
        want = torch.cat([content(key, IDENTITY).data[5, 1] for key in KEYS], 1)
        assert same(last.v.cpu(), want)
        assert busy.query()  # what the loop reads is behind what it launched
        loader.cancel()


@pytest.mark.gpu
def test_loading_comes_between_what_is_launched_before_and_after(tmp_path):
    model = HFModel(build("llama", num_hidden_layers=6).to("cuda"))
    with stored(tmp_path) as store:
        cache = SequenceCache(model.shape, 20 * SIZE)
        torch.cuda._sleep(1 << 30)  # a second or so
        for layer in range(6):
            cache.view(layer, 20 * SIZE).v.fill_(7)
        loader = Loader(model, cache, store, PLACED, 20 * SIZE)
        loader.result()
        for layer in range(6):
            want = torch.cat([content(key, IDENTITY).data[layer, 1] for key in KEYS], 1)
            assert same(cache.view(layer, 20 * SIZE).v.cpu(), want)
        loader.cancel()


@pytest.mark.gpu
def test_a_layer_may_go_while_what_reads_it_has_not_run(tmp_path):
    model = HFModel(build("llama", num_hidden_layers=6).to("cuda"))
    with stored(tmp_path) as store:
        cache, seen = SequenceCache(model.shape, 20 * SIZE), []
        loader = Loader(model, cache, store, PLACED, 20 * SIZE, paced=True)
        for layer in range(6):
            loader.wait(layer)
            torch.cuda._sleep(1 << 28)  # the loader goes on
            seen.append(cache.view(layer, 20 * SIZE).v.clone())
            cache.release(layer)
        for layer, v in enumerate(seen):
            want = torch.cat([content(key, IDENTITY).data[layer, 1] for key in KEYS], 1)
            assert same(v.cpu(), want)
        loader.cancel()


@pytest.mark.gpu
@torch.inference_mode()
def test_recorded_blocks_may_go_while_the_loop_writes_to_them(tmp_path):
    model = HFModel(build("llama", num_hidden_layers=6).to("cuda"))
    with stored(tmp_path) as store:
        recorder = Recorder(model.shape, size=SIZE, start=0)
        cache = SequenceCache(model.shape, 20 * SIZE, recorder)
        loader = Loader(model, cache, store, PLACED, 20 * SIZE)
        loader.result()
        sevens = torch.full((model.shape.num_kv_heads, 8, model.shape.head_dim), 7.0).cuda()
        torch.cuda._sleep(1 << 28)  # what follows waits
        recorder.write(0, SIZE, sevens, sevens)
        cache.recorder, recorder = None, None  # a request that is cancelled
        with loader._side.here():
            others = [torch.zeros(1 << 16, device="cuda") for _ in range(64)]
        loader.cancel()
        assert not any(x.any() for x in others)
