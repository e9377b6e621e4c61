"""A prompt read layer by layer: every bit as chunk by chunk, and what it leaves when it fails."""

import weakref
from contextlib import closing

import pytest
import torch

from engine import Engine, EngineConfig
from engine.decode import decode
from engine.loading import Loader
from engine.method import PRESETS, preset
from engine.model.hf import HFModel
from engine.prefill import prefill, prefill_layers
from engine.recorder import Recorder
from engine.sampling import Sampling
from engine.sparse.cache import SparseCache, pool_shape, sparse_layers
from engine.staging import Placed
from kvstore.config import StoreConfig
from kvstore.pool.pool import Pool
from tests.engine.families import build, prompt

SPARSE = [name for name in PRESETS if name != "dense"]
BLOCK, CHUNK = 16, 48
STORE = StoreConfig(host_bytes=1 << 26)


def small(name, **changes):
    """A method that leaves out most of 150 tokens."""
    return preset(name, **(dict(budget=40, rank=24) | changes))


def config(method, store=STORE, **changes):
    fields = dict(block_tokens=BLOCK, prefill_chunk=CHUNK, pinned_bytes=4 << 20)
    return EngineConfig(method=method, store=store, **(fields | changes))


def by_layers(model, cache, tokens, chunk):
    cache.recorder.fill_on(torch.device("cpu"))
    return prefill_layers(model, cache, tokens, chunk=chunk)


def by_chunks(model, cache, tokens, chunk):
    """The oracle: all layers of a chunk, then the next chunk; then every layer moves."""
    return prefill(model, cache, tokens, chunk=chunk)


def kv(model, cache):
    """All that a cache holds of the prompt: rows of the pool, and buffers of dense layers."""
    moved = sparse_layers(model, cache.method)
    held = [cache._lease.read(n, 0, cache.length) for n in range(len(moved))]
    held += [cache.view(i, cache.length) for i in range(len(model.layers)) if i not in moved]
    return [x for pair in held for x in pair if x is not None]


@torch.inference_mode()
def answer(model, cache, logits, count=5):
    """Logits of a prompt and of the tokens that follow: whatever an index learned is in them."""
    cache.finalize()
    rows = [logits]
    for _ in range(count):
        rows.append(decode(model, [cache], rows[-1].argmax()[None])[0])
    return torch.stack(rows)


def read(model, method, tokens, chunk, loop):
    """What a loop leaves: KV, recorded blocks, and the logits of an answer."""
    with closing(Pool(pool_shape(model, method), 4 << 20)) as pool:
        recorder = Recorder(model.shape, size=BLOCK, start=0)
        with closing(SparseCache(model, len(tokens) + 8, method, pool, recorder)) as cache:
            logits = loop(model, cache, tokens, chunk)
            blocks = [block.data for _, block in recorder.take(len(tokens))]
            rows = answer(model, cache, logits)
            cache._dense.length = len(tokens)  # of the prompt
            return [x.clone() for x in kv(model, cache)] + blocks + [rows]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_layer_by_layer_every_method_has_every_bit_of_chunk_by_chunk(family, name):
    model, tokens = HFModel(build(family)), prompt(150)
    method = small(name)
    ours, theirs = (read(model, method, tokens, CHUNK, loop) for loop in (by_layers, by_chunks))
    assert (
        len(theirs)
        == 2 * len(model.layers)
        - (method.keys == "lowrank") * len(sparse_layers(model, method))
        + 150 // BLOCK
        + 1
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("chunk", [1, 7, 64, 79, 80, 1000])
def test_in_chunks_of_any_size_too(chunk):
    model, tokens = HFModel(build("llama", dtype=torch.bfloat16)), prompt(80)
    method = small("headrace", prefetch="step", attend_on="device", dense_layers=1)
    assert_equal(*(read(model, method, tokens, chunk, loop) for loop in (by_layers, by_chunks)))


def test_behind_a_start_that_is_there_already():
    model, tokens = HFModel(build("qwen3")), prompt(150)

    def twice(loop):
        def run(model, cache, tokens, chunk):
            prefill(model, cache, tokens[:70], chunk=chunk)  # its KV is dense: nothing moved yet
            return loop(model, cache, tokens[70:], chunk)

        return run

    method = small("a2ats")
    ours, theirs = (
        read(model, method, tokens, CHUNK, twice(loop)) for loop in (by_layers, by_chunks)
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", SPARSE)
def test_behind_a_start_stored_in_lmdb_it_is_the_same(name, tmp_path):
    module, tokens = build("gemma3"), prompt(150)
    disk = StoreConfig(host_bytes=0, disk_path=str(tmp_path / "store"), disk_bytes=1 << 27)
    with Engine(module, None, config(small(name), disk)) as engine:
        engine.generate(tokens[:100].tolist(), max_new_tokens=1)
    with Engine(module, None, config(small(name), disk)) as engine:
        run = engine.accept(tokens.tolist(), 9, Sampling(), ())
        logits = engine.plain.prefill(run)
        assert run.stats.cached_tokens == 96
        ours = [x.clone() for x in kv(engine.model, run.cache)]
        ours.append(answer(engine.model, run.cache, logits))
        run.release()
        assert_equal(ours, stored_by_chunks(engine, tokens, 96))
        assert engine.memory.pool.used_bytes == 0


def stored_by_chunks(engine, tokens, start):
    """The same by the other loop, the start loaded as engines do."""
    model, method = engine.model, engine.config.method
    placed = [
        Placed(key, i * BLOCK) for i, key in enumerate(engine.plain.keys(tokens[:start].tolist()))
    ]
    with closing(SparseCache(model, len(tokens) + 8, method, engine.memory.pool)) as cache:
        loader = Loader(model, cache, engine.store, placed, start)
        cache.advance(start)
        logits = prefill(model, cache, tokens[start:], chunk=CHUNK, loader=loader)
        loader.cancel()
        with torch.inference_mode():
            cache.finalize()
        held = [x.clone() for x in kv(model, cache)]
        return [*held, answer(model, cache, logits)]


def test_blocks_that_are_stored_are_those_of_a_dense_engine():
    module, tokens = build("qwen3"), prompt(150).tolist()
    found = []
    for method in (preset("dense"), small("headrace")):
        with Engine(module, None, config(method)) as engine:
            engine.generate(tokens, max_new_tokens=1)
            keys = engine.plain.keys(tokens)
            assert engine.store.lookup(keys) == len(keys) == 150 // BLOCK
            found.append([engine.store.read(key, range(3)).clone() for key in keys])
    assert_equal(*found)


def test_ragged_prompts_are_answered_as_when_they_were_read_chunk_by_chunk():
    module, asked = build("llama"), [prompt(n) for n in (150, 1, 64, 113)]
    with Engine(module, None, config(small("headrace"), pinned_bytes=16 << 20)) as engine:
        model, pool = engine.model, engine.memory.pool
        caches = [SparseCache(model, 200, engine.config.method, pool) for _ in asked]
        rows = torch.stack([by_chunks(model, c, p, CHUNK) for c, p in zip(caches, asked)])
        want = [rows.argmax(-1)]
        for cache in caches:
            cache.finalize()
        for _ in range(7):
            want.append(decode(model, caches, want[-1]).argmax(-1))
        for cache in caches:
            cache.close()
        for warm in (False, True):
            done = engine.generate([p.tolist() for p in asked], max_new_tokens=8)
            assert [x.tokens for x in done] == torch.stack(want, 1).tolist()
            assert any(x.stats.cached_tokens for x in done) == warm
        assert pool.used_bytes == 0


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_and_blocks_are_recorded_in_host_memory():
    model, tokens = HFModel(build("qwen3").to("cuda")), prompt(150).cuda()
    ours, theirs = (
        read(model, small("headrace"), tokens, CHUNK, loop) for loop in (by_layers, by_chunks)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_stored_start_is_loaded_no_further_ahead_than_the_next_group_of_layers(monkeypatch):
    asked = prompt(500).tolist()
    settings = config(small("headrace"), block_tokens=450, pinned_bytes=16 << 20)
    with Engine(build("llama-mha-llama3", num_hidden_layers=6), None, settings) as engine:
        engine.generate(asked, max_new_tokens=1)
        at, loads, place = [], [], Loader._place
        for i, layer in enumerate(engine.model.layers):
            layer.qkv = lambda x, i=i, qkv=layer.qkv: (at.append(i), qkv(x))[1]

        def watch(self, layers, *rest):
            loads.append((layers, len(set(at))))
            place(self, layers, *rest)

        monkeypatch.setattr(Loader, "_place", watch)
        assert engine.generate(asked, max_new_tokens=1)[0].stats.cached_tokens == 450
        assert [layers for layers, _ in loads] == [range(0, 2), range(2, 4), range(4, 6)]
        assert all(begun >= layers.start - 1 for layers, begun in loads)


# what goes wrong


class Ended(KeyboardInterrupt):
    """What a user presses."""


@pytest.fixture
def watched(monkeypatch):
    """Every cache that is made, as long as somebody holds it."""
    seen, init = [], SparseCache.__init__

    def watch(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen.append(weakref.ref(self._dense))

    monkeypatch.setattr(SparseCache, "__init__", watch)
    return seen


@pytest.mark.parametrize("at", [(0, 0), (1, 0), (1, 2), (2, 3)], ids=str)
def test_ended_in_any_layer_and_chunk_it_frees_everything(watched, at):
    asked = prompt(150).tolist()
    with Engine(build("llama"), None, config(small("headrace"))) as engine:
        layer, calls = engine.model.layers[at[0]], []
        qkv = layer.qkv

        def end(x):
            calls.append(x)
            if len(calls) > at[1]:
                raise Ended
            return qkv(x)

        layer.qkv = end
        with pytest.raises(Ended):
            engine.generate(asked, max_new_tokens=5)
        layer.qkv = qkv
        assert engine.memory.pool.used_bytes == 0
        assert [x() for x in watched] == [None]
        assert engine.store.lookup(engine.plain.keys(asked)) == 0  # no block had all its layers
        assert len(engine.generate(asked, max_new_tokens=5)[0].tokens) == 5


def test_a_stream_that_is_closed_frees_everything(watched):
    with Engine(build("llama"), None, config(small("headrace"))) as engine:
        stream = engine.stream(prompt(150).tolist(), max_new_tokens=50)
        next(stream)
        assert engine.memory.pool.used_bytes > 0
        stream.close()
        del stream
        assert engine.memory.pool.used_bytes == 0
        assert [x() for x in watched] == [None]


def test_stored_blocks_that_are_lost_in_a_later_layer_are_computed_again(monkeypatch):
    """The layers before are in the pool by then."""
    asked, settings = prompt(500).tolist(), config(small("headrace"), block_tokens=450)
    with Engine(build("llama-mha-llama3"), None, settings) as engine:  # read in groups of 2 layers
        want = engine.generate(asked, max_new_tokens=8)[0].tokens
        read_many, lost = engine.store.read_many, []

        def lose_once(keys, layers, out):
            found = read_many(keys, layers, out)
            if not lost and layers.start > 0:
                lost.append(keys[0])
                found[0] = None
            return found

        monkeypatch.setattr(engine.store, "read_many", lose_once)
        assert engine.generate(asked, max_new_tokens=8)[0].tokens == want
        assert lost
        assert engine.memory.pool.used_bytes == 0


def test_a_pool_that_is_full_is_found_out_in_the_first_layer():
    with Engine(build("llama"), None, config(small("headrace"))) as engine:
        spent = engine.memory.pool.lease()
        spent.reserve(engine.memory.pool.free_blocks * engine.memory.pool.shape.block_tokens)
        computed = []
        second, qkv = engine.model.layers[1], engine.model.layers[1].qkv
        second.qkv = lambda x: (computed.append(x), qkv(x))[1]
        with pytest.raises(Exception, match="pinned_bytes"):
            engine.generate(prompt(150).tolist(), max_new_tokens=5)
        assert not computed
        spent.close()


def test_one_token_is_a_prompt():
    with Engine(build("gemma3"), None, config(small("quest"))) as engine:
        assert len(engine.generate([5], max_new_tokens=3)[0].tokens) == 3
