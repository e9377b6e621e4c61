"""KV that moves down and back: the same bits, few copies, only new bytes, and exact budgets."""

import threading
from contextlib import closing, nullcontext
from itertools import pairwise
from random import Random
from unittest.mock import Mock

import pytest
import torch

from engine.decode import decode
from engine.model.hf import HFModel
from engine.model.pieces import Shape
from engine.prefill import prefill
from engine.recorder import Recorder
from engine.service.slab import SlabCache
from engine.service.swap import Swap, _stream_after
from engine.step import Piece, step
from kvstore.errors import CorruptRecord, PoolFull, StoreError
from kvstore.pool.spill import Spill
from tests.engine.families import build, prompt

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 16, 211, 1 << 20, torch.float32, CPU)
TOKEN = SHAPE.kv_bytes_per_token  # 512
PLACES = ["host", "disk", "both"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Of 8 tokens, 64 of which go together: so that a few tokens are many."""
    monkeypatch.setattr("engine.service.swap_file.PIECE_BYTES", 8 * TOKEN)
    monkeypatch.setattr("engine.service.swap_file.RUN_TOKENS", 64)


def swap_in(place, path, shape, tokens):
    """Room for so many tokens of requests that are out."""
    nbytes = shape.kv_bytes_per_token * tokens
    spill = None if place == "host" else Spill(path / "spill", 4 * nbytes + (8 << 20))
    return Swap(shape, {"host": nbytes, "disk": 0, "both": nbytes // 3}[place], spill)


def grow(cache, count, dice=None):
    """So many more tokens, of random KV."""
    generator = torch.Generator().manual_seed((dice or Random(cache.length)).randrange(1 << 30))
    s = cache.shape
    new = torch.randn(s.num_layers, 2, s.num_kv_heads, count, s.head_dim, generator=generator)
    cache.slab[:, :, :, cache.length : cache.length + count] = new.to(s.dtype)
    cache.advance(count)


def disk_bytes(swap):
    """Of pieces that requests have."""
    return (swap._file.count - swap._file.free) * swap._file.piece_bytes


def held(cache):
    return cache.slab[:, :, :, : cache.length].clone()


def filled(tokens, capacity=6000, shape=SHAPE):
    cache = SlabCache(shape, capacity)
    grow(cache, tokens)
    return cache


# what comes back


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-mha-llama3"])
def test_requests_that_move_at_random_steps_have_every_bit_of_one_that_stays(
    family, dtype, place, tmp_path
):
    move_at_random(build(family, dtype=dtype), place, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
def test_on_a_gpu_they_do_too(place, tmp_path):
    move_at_random(build("llama").cuda(), place, tmp_path)


def move_at_random(module, place, path):
    model, dice = HFModel(module), Random(3)
    prompts = [prompt(n).to(model.shape.device) for n in (60, 9, 33)]
    want = [alone(model, tokens, 8) for tokens in prompts]
    rows = [[] for _ in prompts]
    swap = swap_in(place, path, model.shape, 220)
    with closing(swap):
        recorders = [Recorder(model.shape, size=16, start=0) for _ in prompts]
        caches = [SlabCache(model.shape, len(p) + 8, r) for p, r in zip(prompts, recorders)]
        while any(len(r) < 9 for r in rows):
            b = dice.choice([b for b, r in enumerate(rows) if len(r) < 9])
            if not caches[b].loaded:
                swap.back(caches[b]).result(60)
            rows[b] += advance(model, caches[b], prompts[b], rows[b])
            if dice.random() < 0.6:
                swap.out(caches[b])
            swap.check()
        for b, (logits, blocks) in enumerate(want):
            assert torch.equal(torch.stack(rows[b]), logits)
            ours = [block.data for _, block in recorders[b].take(caches[b].length)]
            assert all(torch.equal(x, y) for x, y in zip(ours, blocks, strict=True))
            swap.forget(caches[b])
        assert swap.used_bytes == 0
        assert swap.stats.outs > 10
        assert (swap.stats.disk_bytes_read > 0) == (place != "host")


def advance(model, cache, tokens, rows):
    """A chunk of the prompt, or one more token: as requests alone, so that no sum differs."""
    if cache.length < len(tokens):
        part = tokens[cache.length : cache.length + 25]
        last = cache.length + len(part) == len(tokens)
        return [r for r in step(model, [Piece(cache, part, prompt=True, logits=last)]) if last]
    return step(model, [Piece(cache, rows[-1].argmax()[None], prompt=False)])


def alone(model, tokens, count):
    recorder = Recorder(model.shape, size=16, start=0)
    cache = SlabCache(model.shape, len(tokens) + count, recorder)
    rows = [prefill(model, cache, tokens, chunk=25)]
    for _ in range(count):
        rows.append(decode(model, [cache], rows[-1].argmax()[None])[0])
    return torch.stack(rows), [block.data for _, block in recorder.take(cache.length)]


@pytest.mark.parametrize("place", PLACES)
def test_a_request_of_4k_tokens_takes_at_most_8_copies_each_way(place, tmp_path):
    with closing(swap_in(place, tmp_path, SHAPE, 5000)) as swap:
        cache = filled(4096)
        want = held(cache)
        swap.out(cache)
        assert swap.stats.copies_out <= 8
        assert swap.stats.bytes_out == 4096 * TOKEN
        swap.back(cache).result(60)
        assert swap.stats.copies_back <= 8
        assert swap.stats.bytes_back == 4096 * TOKEN
        assert torch.equal(held(cache), want)


@pytest.mark.parametrize("place", PLACES)
def test_the_second_time_only_new_bytes_move(place, tmp_path):
    with closing(swap_in(place, tmp_path, SHAPE, 5000)) as swap:
        cache, moved = filled(4096), [0]
        for new in (0, 1, 100, 0):
            grow(cache, new)
            want = held(cache)
            swap.out(cache)
            moved.append(swap.stats.bytes_out)
            swap.back(cache).result(60)
            assert torch.equal(held(cache), want)
        steps = [b - a for a, b in pairwise(moved)]
        assert steps == [4096 * TOKEN, TOKEN, 100 * TOKEN, 0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("grown", [(1,), (500, 1), (64, 64, 3)])
def test_however_often_it_moves_it_is_in_8_copies_and_little_moves_twice(place, grown, tmp_path):
    with closing(swap_in(place, tmp_path, SHAPE, 5000)) as swap:
        cache = filled(2000)
        for turn in range(40):
            before, length = swap.stats.copies_back, cache.length
            want = held(cache)
            swap.out(cache)
            swap.check()
            swap.back(cache).result(60)
            assert torch.equal(held(cache), want)
            assert swap.stats.copies_back - before <= 8
            if length + max(grown) <= 4096:
                grow(cache, grown[turn % len(grown)])
        assert swap.stats.bytes_out < 3 * 4096 * TOKEN


# budgets


def test_copies_of_running_requests_make_room_from_their_end(tmp_path):
    with closing(Swap(SHAPE, 100 * TOKEN)) as swap:
        first, second = filled(30), filled(50)
        swap.out(first)
        swap.back(first).result(60)
        grow(first, 20)
        swap.out(first)
        swap.back(first).result(60)  # 30 and 20 below
        want = held(first)
        swap.out(second)
        assert swap.used_bytes == 100 * TOKEN
        third = filled(15)
        swap.out(third)
        swap.check()
        assert swap.used_bytes == (30 + 50 + 15) * TOKEN  # the 20 went
        moved = swap.stats.bytes_out
        swap.forget(third)
        swap.out(first)
        assert swap.stats.bytes_out - moved == 20 * TOKEN
        swap.back(first).result(60)
        assert torch.equal(held(first), want)


def test_without_room_below_it_says_which_setting_and_the_request_still_runs(tmp_path):
    with closing(Swap(SHAPE, 100 * TOKEN)) as swap:
        first, second = filled(60), filled(41)
        swap.out(first)
        with pytest.raises(PoolFull, match=r"41 tokens .* 30720 of 51200 .*raise schedule.swap_by"):
            swap.out(second)
        assert second.loaded
        swap.check()
        swap.forget(first)
        swap.out(second)


def test_what_cannot_be_put_together_is_counted_no_more(tmp_path, monkeypatch):
    with closing(Swap(SHAPE, 1000 * TOKEN)) as swap:
        cache = filled(10)
        for more in (10, 10, 10, 10, 10, 10, 50, 10):  # as many copies as there may be
            swap.out(cache)
            swap.back(cache).result(60)
            grow(cache, more)
        want = held(cache)
        with monkeypatch.context() as patch:
            patch.setattr("engine.service.swap.own_pages", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                swap.out(cache)
        swap.check()
        swap.out(cache)
        swap.back(cache).result(60)
        assert torch.equal(held(cache), want)
        swap.forget(cache)
        assert swap.used_bytes == 0


def test_without_room_on_disk_it_names_both_settings(small_pieces, tmp_path):
    with closing(Swap(SHAPE, 16 * TOKEN, spill_of(tmp_path, 5))) as swap:
        assert swap.capacity_bytes == 40 * TOKEN
        first, second = filled(33), filled(17)
        swap.out(first)
        with pytest.raises(PoolFull, match=r"0 of 5 pieces .*schedule.swap_bytes or spill_bytes"):
            swap.out(second)
        swap.check()
        swap.out(filled(16))  # in host memory


def spill_of(path, pieces, shape=SHAPE):
    """A spill with room for so many pieces of 8 tokens."""
    with closing(Spill(path / "probe", 1 << 20)) as probe:
        cost = probe.cost(8 * shape.kv_bytes_per_token)
    return Spill(path / "spill", pieces * cost)


def test_a_spill_that_holds_no_piece_is_refused(tmp_path):
    with (
        closing(Spill(tmp_path, 1000)) as spill,
        pytest.raises(PoolFull, match="spill_bytes 1000 holds no piece"),
    ):
        Swap(SHAPE, 0, spill)


def test_who_has_been_out_longest_goes_to_disk(small_pieces, tmp_path):
    with closing(Swap(SHAPE, 100 * TOKEN, spill_of(tmp_path, 40))) as swap:
        caches = [filled(40) for _ in range(3)]
        want = [held(cache) for cache in caches]
        for cache in caches:
            swap.out(cache)
            swap.check()
        assert swap.used_bytes == 80 * TOKEN
        assert disk_bytes(swap) == 40 * TOKEN
        for cache in caches[1:]:
            swap.back(cache).result(60)
        assert swap.stats.disk_bytes_read == 0
        swap.back(caches[0]).result(60)
        assert all(torch.equal(held(c), x) for c, x in zip(caches, want))


def test_the_last_piece_on_disk_is_filled_up_before_another_is_taken(small_pieces, tmp_path):
    with closing(Swap(SHAPE, 10 * TOKEN, spill_of(tmp_path, 40))) as swap:
        cache, other = filled(3), filled(8)
        for _ in range(12):
            swap.out(cache)
            swap.out(other)  # the first one's copy goes to disk for it
            assert disk_bytes(swap) >= swap.cost(cache.length) - 8 * TOKEN
            assert disk_bytes(swap) <= swap.cost(cache.length) + swap.cost(other.length)
            for back in (cache, other):
                swap.back(back).result(60)
            swap.check()
            grow(cache, 3)
        want = held(cache)
        swap.out(cache)
        swap.back(cache).result(60)
        assert torch.equal(held(cache), want)


def test_the_file_does_not_grow_with_what_passed_through_it(tmp_path):
    with closing(swap_in("disk", tmp_path, SHAPE, 5000)) as swap:
        sizes = []
        for turn in range(12):
            caches = [filled(1000 + turn), filled(3000)]
            for cache in caches:
                swap.out(cache)
            for cache in caches:
                swap.forget(cache)
            (file,) = tmp_path.glob("spill/.headrace-spill-*/data.mdb")
            sizes.append(file.stat().st_size)
        assert sizes[-1] <= sizes[1] * 1.5


# what goes wrong


def damage(path, swap, cache, byte=b"damage"):
    """Overwrite some bytes of a request's first piece."""
    spill, number = swap._file.spill, swap._below.copies[cache].disk.numbers[0]
    (file,) = path.glob("spill/.headrace-spill-*/data.mdb")
    with file.open("r+b") as handle:
        handle.seek(spill._places[number].page * 4096 + 16 + 5000)
        handle.write(byte)


def test_damage_on_disk_ends_that_request_only(tmp_path):
    with closing(swap_in("disk", tmp_path, SHAPE, 5000)) as swap:
        broken, sound = filled(2100), filled(2500)
        want = held(sound)
        for cache in (broken, sound):
            swap.out(cache)
        damage(tmp_path, swap, broken)
        futures = [swap.back(cache) for cache in (broken, sound)]
        with pytest.raises(CorruptRecord, match="is not what was written there"):
            futures[0].result(60)
        assert not broken.loaded
        futures[1].result(60)
        assert torch.equal(held(sound), want)
        swap.forget(broken)
        swap.check()
        again = filled(2100)
        want = held(again)
        swap.out(again)
        swap.back(again).result(60)
        assert torch.equal(held(again), want)


def test_damage_that_another_request_finds_ends_not_that_one(tmp_path):
    """The broken one's last piece would be filled up to make room for the other."""
    with closing(Swap(SHAPE, 3000 * TOKEN, Spill(tmp_path / "spill", 64 << 20))) as swap:
        broken, other = filled(500), filled(2900)
        swap.out(broken)
        swap.out(other)  # the first one goes to disk for it
        swap.back(other).result(60)
        swap.back(broken).result(60)
        grow(broken, 2600)
        swap.out(broken)  # in a segment of its own
        damage(tmp_path, swap, broken)
        grow(other, 50)
        swap.out(other)
        swap.check()
        assert swap.used_bytes == 2950 * TOKEN  # what was left of the broken one is gone
        with pytest.raises(CorruptRecord):
            swap.back(broken).result(60)
        want = other.length
        swap.back(other).result(60)
        assert other.length == want
        swap.forget(broken)
        swap.check()


def test_a_full_disk_is_an_error_that_changes_nothing(small_pieces, tmp_path, monkeypatch):
    with closing(Swap(SHAPE, 50 * TOKEN, spill_of(tmp_path, 40))) as swap:
        first, second = filled(40), filled(45)
        want = [held(first), held(second)]
        swap.out(first)

        def full(spill, blocks):
            raise StoreError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(Spill, "write", full)
            with pytest.raises(StoreError, match="no space left"):
                swap.out(second)
        assert second.loaded
        swap.check()
        swap.out(second)
        for cache, kv in zip((first, second), want):
            swap.back(cache).result(60)
            assert torch.equal(held(cache), kv)


@pytest.mark.parametrize("place", PLACES)
def test_a_request_that_is_out_or_on_its_way_back_can_be_forgotten(place, tmp_path):
    with closing(swap_in(place, tmp_path, SHAPE, 5000)) as swap:
        out, coming, queued, running = (filled(n) for n in (500, 2000, 700, 300))
        for cache in (out, coming, queued, running):
            swap.out(cache)
        swap.back(running).result(60)
        futures = [swap.back(coming), swap.back(queued)]
        for cache in (queued, coming, out, running, running):
            swap.forget(cache)
            swap.check()
        assert swap.used_bytes == 0
        assert all(future.done() for future in futures)


def test_room_is_waited_for_until_those_on_their_way_are_back(small_pieces, tmp_path, monkeypatch):
    go, started = threading.Event(), threading.Event()
    load = SlabCache.load

    def slow(cache, slab):
        started.set()
        assert go.wait(60)
        load(cache, slab)

    with closing(Swap(SHAPE, 100 * TOKEN)) as swap:
        coming, other = filled(80), filled(70)
        want = held(coming)
        swap.out(coming)
        monkeypatch.setattr(SlabCache, "load", slow)
        future = swap.back(coming)
        assert started.wait(60)
        opener = threading.Thread(target=go.set)
        opener.start()
        swap.out(other)  # its room is the other's, until that one is there
        opener.join()
        assert future.done()
        swap.check()
        assert torch.equal(held(coming), want)


def test_what_a_gpu_was_told_is_done_when_a_read_fails_behind_it(monkeypatch):
    """Or copies would still be written to memory that is free by then."""
    done, ready = [], Mock(spec=torch.cuda.Event)

    class Stream:
        def wait_event(self, event):
            done.append(event)

        def synchronize(self):
            done.append("all")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    with pytest.raises(CorruptRecord), _stream_after(ready):
        raise CorruptRecord("a piece is damaged")
    assert done == [ready, "all"]


def test_closing_ends_all_and_twice_is_once(tmp_path):
    swap = swap_in("both", tmp_path, SHAPE, 5000)
    caches = [filled(1000) for _ in range(3)]
    for cache in caches:
        swap.out(cache)
    swap.back(caches[0])
    swap.close()
    swap.close()
    assert swap.used_bytes == 0
    assert not list(tmp_path.glob("spill/.headrace-spill-*"))
