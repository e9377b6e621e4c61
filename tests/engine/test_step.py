"""Pieces of many requests in one step: each as if it were alone, whatever the others do."""

import threading
from contextlib import ExitStack, closing

import pytest
import torch

from engine import Engine
from engine.cache import Query, SequenceCache
from engine.decode import decode
from engine.errors import EngineError
from engine.method import preset
from engine.model.hf import HFModel
from engine.prefill import prefill
from engine.recorder import Recorder
from engine.service.slab import SlabCache
from engine.sparse.cache import OBSERVED, SparseCache, pool_shape
from engine.step import Piece, step
from kvstore.pool.pool import Pool
from tests.engine.families import build, every_family, prompt

LENGTHS = (45, 7, 1, 60)
CLOSE = dict(rtol=1e-5, atol=3e-5)  # logits here are up to 10: other sums, the same numbers


class Broken(Exception):
    """What a cache or a loader raises."""


def new(model, length=160, recorder=None):
    return SequenceCache(model.shape, length, recorder)


def alone(model, tokens, count=0):
    """The oracle: a prompt read at once by itself, then greedy tokens; rows of logits, cache."""
    cache = new(model)
    rows = [prefill(model, cache, tokens, chunk=1000)]
    for _ in range(count):
        rows.append(decode(model, [cache], rows[-1].argmax()[None])[0])
    return rows, cache


def chunks(total, size):
    return [(lo, min(lo + size, total)) for lo in range(0, total, size)]


def read(model, prompts, caches, sizes):
    """Prompts in chunks of their own sizes, as many at a time as are left; their last logits."""
    plans, last = [chunks(len(p), n) for p, n in zip(prompts, sizes)], {}
    while any(plans):
        turn = [b for b, plan in enumerate(plans) if plan]
        spans = {b: plans[b].pop(0) for b in turn}
        pieces = [
            Piece(caches[b], prompts[b][slice(*spans[b])], prompt=True, logits=not plans[b])
            for b in turn
        ]
        for b, row in zip(turn, step(model, pieces)):
            assert (row is None) == bool(plans[b])
            last[b] = row
        assert [p.error for p in pieces] == [None] * len(turn)
    return [last[b] for b in range(len(prompts))]


def assert_same_kv(model, ours, theirs):
    assert ours.length == theirs.length
    for i in range(model.shape.num_layers):
        for a, b in zip(ours.view(i, ours.length), theirs.view(i, theirs.length)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_family
def test_prompts_packed_have_the_logits_and_the_kv_of_each_alone(family):
    model, prompts = HFModel(build(family)), [prompt(n) for n in LENGTHS]
    caches = [new(model) for _ in prompts]
    rows = read(model, prompts, caches, [1000] * 4)
    for tokens, cache, row in zip(prompts, caches, rows):
        (want,), other = alone(model, tokens)
        torch.testing.assert_close(row, want, **CLOSE)
        assert_same_kv(model, cache, other)


@pytest.mark.parametrize("batch", range(1, 9))
def test_chunks_of_any_size_beside_each_other(batch):
    model = HFModel(build("gemma3"))
    prompts = [prompt(5 + 17 * b, seed=b) for b in range(batch)]
    caches = [new(model) for _ in prompts]
    rows = read(model, prompts, caches, [3 + 7 * b for b in range(batch)])
    for tokens, cache, row in zip(prompts, caches, rows):
        (want,), other = alone(model, tokens)
        torch.testing.assert_close(row, want, **CLOSE)
        assert_same_kv(model, cache, other)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gemma2"])
def test_prompts_read_beside_running_requests_change_no_token_of_either(family):
    model, count = HFModel(build(family)), 12
    first, second = prompt(50), prompt(70)
    want = [[int(r.argmax()) for r in alone(model, p, count)[0]] for p in (first, second)]
    caches, got = [SlabCache(model.shape, 90) for _ in want], [[], []]
    (row,) = step(model, [Piece(caches[0], first, prompt=True)])
    got[0].append(int(row.argmax()))
    for lo, hi in chunks(70, 13):  # the second one, 13 tokens a step, the first one decodes
        chunk = Piece(caches[1], second[lo:hi], prompt=True, logits=hi == 70)
        newest = Piece(caches[0], torch.tensor(got[0][-1:]), prompt=False)
        turn = [chunk, newest] if lo % 2 else [newest, chunk]
        rows = dict(zip((id(x) for x in turn), step(model, turn)))
        got[0].append(int(rows[id(newest)].argmax()))
    got[1].append(int(rows[id(chunk)].argmax()))
    while len(got[1]) <= count:
        live = [b for b in (0, 1) if len(got[b]) <= count]
        turn = [Piece(caches[b], torch.tensor(got[b][-1:]), prompt=False) for b in live]
        for b, row in zip(live, step(model, turn)):
            got[b].append(int(row.argmax()))
    assert got == want


def test_tokens_of_packed_requests_are_those_that_an_engine_generates():
    module, prompts = build("qwen3"), [prompt(n) for n in LENGTHS]
    with Engine(module) as engine:
        want = [x.tokens for x in engine.generate([p.tolist() for p in prompts], max_new_tokens=9)]
    model = HFModel(module)
    caches = [SlabCache(model.shape, len(p) + 9) for p in prompts]
    got = [[int(row.argmax())] for row in read(model, prompts, caches, [11, 20, 5, 60])]
    for _ in range(8):
        newest = [torch.tensor(tokens[-1:]) for tokens in got]
        pieces = [Piece(c, t, prompt=False) for c, t in zip(caches, newest)]
        for tokens, row in zip(got, step(model, pieces)):
            tokens.append(int(row.argmax()))
    assert got == want


def test_what_is_recorded_is_what_a_request_alone_records():
    model, prompts = HFModel(build("llama")), [prompt(40), prompt(33)]
    recorders = [Recorder(model.shape, size=16, start=0) for _ in range(4)]
    read(model, prompts, [new(model, 50, r) for r in recorders[:2]], [9, 40])
    for tokens, recorder in zip(prompts, recorders[2:]):
        prefill(model, new(model, 50, recorder), tokens)
    for ours, theirs, length in zip(recorders[:2], recorders[2:], (40, 33)):
        for (i, a), (j, b) in zip(ours.take(length), theirs.take(length), strict=True):
            assert i == j
            torch.testing.assert_close(a.data, b.data, rtol=1e-5, atol=1e-5)


def sparse(model, method, pool, tokens):
    return SparseCache(model, len(tokens) + 8, method, pool)


@pytest.mark.parametrize("name", ["headrace", "quest", "a2ats", "shadowkv"])
def test_sparse_requests_decode_packed_as_alone(name):
    """With all tokens in the budget: there rounding changes no choice."""
    model, prompts = HFModel(build("llama")), [prompt(n) for n in (90, 140)]
    method = preset(name, budget=400, rank=10_000, prefetch="layer", attend_on="device")
    if name == "shadowkv":
        method = preset(name, budget=400, rank=10_000, options={"outlier_chunks": 0})
    with ExitStack() as stack:
        pool = stack.enter_context(closing(Pool(pool_shape(model, method), 8 << 20)))
        ours = [stack.enter_context(closing(sparse(model, method, pool, p))) for p in prompts]
        rows = read(model, prompts, ours, [50, 33])
        for cache in ours:
            cache.finalize()
        reading = new(model)  # somebody else's prompt goes on in between
        for at in range(5):
            newest = [row.argmax()[None] for row in rows]
            turn = [Piece(c, t, prompt=False) for c, t in zip(ours, newest)]
            turn.insert(at % 3, Piece(reading, prompt(6), prompt=True, logits=False))
            rows = [row for row in step(model, turn) if row is not None]
        for tokens, row in zip(prompts, rows):
            with closing(sparse(model, method, pool, tokens)) as cache:
                want = prefill(model, cache, tokens)
                cache.finalize()
                for _ in range(5):
                    want = decode(model, [cache], want.argmax()[None])[0]
            torch.testing.assert_close(row, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [(150,), (100, 50), (7,) * 21 + (3,), (149, 1)])
def test_the_queries_that_indexes_learn_from_do_not_depend_on_chunks(sizes):
    model, tokens = HFModel(build("llama")), prompt(150)
    method = preset("a2ats")
    with (
        closing(Pool(pool_shape(model, method), 4 << 20)) as pool,
        closing(sparse(model, method, pool, tokens)) as cache,
    ):
        whole, observe = [], cache.observe
        cache.observe = lambda i, q: (whole.append((i, q)), observe(i, q))
        for part in tokens.split(list(sizes)):
            step(model, [Piece(cache, part, prompt=True)])
        for i in range(model.shape.num_layers):
            every = torch.cat([q for j, q in whole if j == i], 1)
            assert torch.equal(cache._queries[i], every[:, -OBSERVED:])


class Guessed(SequenceCache):
    """Wants guesses, and keeps them."""

    wants_guess = True

    def look_ahead(self, layer, guess):
        self.seen.append((layer, guess))


def test_guesses_are_those_of_the_request_itself_in_any_step():
    model, tokens = HFModel(build("gemma3")), [prompt(30), prompt(41)]

    def guesses(packed):
        caches = [Guessed(model.shape, 60) for _ in tokens]
        for cache, own in zip(caches, tokens):
            prefill(model, cache, own)
            cache.seen = []
        pieces = [Piece(c, prompt(1, seed=b), prompt=False) for b, c in enumerate(caches)]
        if packed:
            step(model, [pieces[0], Piece(new(model), prompt(9), prompt=True), pieces[1]])
        else:
            for piece in pieces:
                step(model, [piece])
        return [cache.seen for cache in caches]

    for ours, theirs in zip(guesses(packed=True), guesses(packed=False)):
        assert [layer for layer, _ in ours] == [layer for layer, _ in theirs] == [1, 2, 3]
        for (_, a), (_, b) in zip(ours, theirs):
            torch.testing.assert_close(tuple(a), tuple(b), **CLOSE)


def test_indexes_are_built_a_layer_at_a_time_and_are_those_of_finalize():
    model, tokens = HFModel(build("llama")), prompt(90)
    method = preset("headrace", budget=40)
    with closing(Pool(pool_shape(model, method), 8 << 20)) as pool, ExitStack() as stack:
        a, b = (stack.enter_context(closing(sparse(model, method, pool, tokens))) for _ in "ab")
        first = [prefill(model, cache, tokens) for cache in (a, b)]
        built = []
        for _ in a.settle():
            with pytest.raises(EngineError, match="finalize"):
                a.attend(0, Query(*torch.zeros(2, 4, 64)), model.layers[0].attention)
            built.append(sum(layer.choice is not None for layer in a._layers.values()))
        assert built == list(range(1, len(a._layers) + 1))
        b.finalize()
        rows = [decode(model, [c], r.argmax()[None]) for c, r in zip((a, b), first)]
        assert torch.equal(*rows)


# what goes wrong in one piece


class Failing(SequenceCache):
    """Raises in one of its methods at one layer, if told to."""

    at: tuple[str, int] | None = None

    def append(self, layer, *kv):
        self._fail("append", layer)
        return super().append(layer, *kv)

    def attend(self, layer, *query):
        self._fail("attend", layer)
        return super().attend(layer, *query)

    def look_ahead(self, layer, guess):
        self._fail("look_ahead", layer)

    def _fail(self, what, layer):
        if self.at == (what, layer):
            raise Broken(what)


class Late:
    """A loader that is there, or is not, at a layer."""

    def __init__(self, at=None):
        self.at, self.waited = at, []

    def wait(self, layer):
        self.waited.append(layer)
        if layer == self.at:
            raise Broken("wait")


def mixed(model, at, loader=None):
    """A step of a prompt and two running requests, of which the middle one fails at `at`."""
    caches = [Failing(model.shape, 100) for _ in range(3)]
    for b, cache in enumerate(caches[1:]):
        prefill(model, cache, prompt(30 + b))
    caches[1].at = None if loader else at
    pieces = [
        Piece(caches[0], prompt(20), prompt=True),
        Piece(caches[1], prompt(9 if loader else 1), prompt=loader is not None),
        Piece(caches[2], prompt(1, seed=3), prompt=False),
    ]
    pieces[1].loader = loader
    rows = step(model, pieces)
    kv = [torch.stack(c.view(i, c.length)) for c in (caches[0], caches[2]) for i in range(3)]
    return pieces, rows, kv


@pytest.mark.parametrize("what", ["append", "attend", "look_ahead", "wait"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_piece_that_fails_changes_no_bit_of_the_others(what, layer):
    model, loading = HFModel(build("llama")), what == "wait"
    sound, want, kv = mixed(model, None, Late() if loading else None)
    pieces, rows, other = mixed(model, (what, layer), Late(layer) if loading else None)
    if (what, layer) == ("look_ahead", 0):  # nobody looks ahead to the first one
        assert pieces[1].error is None
        return
    assert isinstance(pieces[1].error, Broken)
    assert [p.error for p in sound] == [None] * 3
    assert pieces[0].error is pieces[2].error is rows[1] is None
    assert torch.equal(rows[0], want[0])
    assert torch.equal(rows[2], want[2])
    assert all(torch.equal(a, b) for a, b in zip(kv, other))
    assert [p.cache.length for p in pieces] == [20, 30, 32]


def test_a_loader_is_waited_for_layer_by_layer_by_its_piece_alone():
    model, loader = HFModel(build("llama")), Late()
    mixed(model, None, loader)
    assert loader.waited == [0, 1, 2]


def test_a_failed_piece_can_be_computed_again():
    model, tokens = HFModel(build("llama")), prompt(20)
    cache = Failing(model.shape, 40)
    cache.at = ("append", 2)
    piece = Piece(cache, tokens, prompt=True)
    assert step(model, [piece]) == [None]
    assert isinstance(piece.error, Broken)
    cache.at, piece.error = None, None
    (row,) = step(model, [piece])
    assert torch.equal(row, alone(model, tokens)[0][0])


def test_what_the_model_raises_is_raised_and_no_cache_has_grown():
    model = HFModel(build("llama"))
    caches = [new(model), new(model)]

    def broken(x):
        raise Broken("qkv")

    model.layers[1].qkv = broken
    with pytest.raises(Broken, match="qkv"):
        step(model, [Piece(cache, prompt(5), prompt=True) for cache in caches])
    assert [cache.length for cache in caches] == [0, 0]


@pytest.mark.parametrize("loop", ["prefill", "decode"])
def test_the_loops_raise_what_a_cache_raises(loop):
    model, cache = HFModel(build("llama")), Failing(HFModel(build("llama")).shape, 40)
    prefill(model, cache, prompt(9))
    cache.at = ("append", 1)
    run = {
        "prefill": lambda: prefill(model, cache, prompt(5)),
        "decode": lambda: decode(model, [cache], prompt(1)),
    }[loop]
    with pytest.raises(Broken, match="append"):
        run()
    assert cache.length == 9


def test_an_error_keeps_no_tensor_of_the_step():
    model = HFModel(build("llama"))
    cache = Failing(model.shape, 40)
    cache.at = ("append", 1)
    piece = Piece(cache, prompt(9), prompt=True)
    step(model, [piece])
    trace, held = piece.error.__traceback__, []
    while trace is not None:
        held += trace.tb_frame.f_locals.values()
        trace = trace.tb_next
    assert not held


def test_no_token_is_computed_for_padding():
    model, counted = HFModel(build("llama")), []
    for layer in model.layers:
        layer.qkv = lambda x, qkv=layer.qkv: (counted.append(len(x)), qkv(x))[1]
    prompts = [prompt(n) for n in LENGTHS]
    heads, logits = [], model.logits
    model.logits = lambda x: (heads.append(len(x)), logits(x))[1]
    read(model, prompts, [new(model) for _ in prompts], [1000] * 4)
    assert counted == [sum(LENGTHS)] * 3
    assert heads == [len(LENGTHS)]


def test_steps_in_two_threads_at_once_do_not_disturb_each_other():
    """Nothing of a step is in the model: two services may share one."""
    model, prompts = HFModel(build("llama")), [prompt(40), prompt(50)]
    want, got = [alone(model, p)[0][0] for p in prompts], [None, None]

    def work(b):
        for _ in range(5):
            (got[b],) = step(model, [Piece(new(model), prompts[b], prompt=True)])

    threads = [threading.Thread(target=work, args=(b,)) for b in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
