"""One tensor for a whole request: the same cache, and memory that comes and goes as it is used."""

import ctypes
import errno
import mmap

import pytest
import torch

from engine import Engine, EngineConfig
from engine.cache import SequenceCache
from engine.decode import decode
from engine.errors import EngineError
from engine.loading import Loader
from engine.model.hf import HFModel
from engine.model.pieces import Shape
from engine.prefill import prefill
from engine.recorder import Recorder
from engine.service.slab import SlabCache
from engine.staging import Placed
from tests.engine.families import build, every_family, prompt

CPU = torch.device("cpu")


def shape(layers=2, heads=2, dim=16, dtype=torch.float32):
    return Shape(layers, 2 * heads, heads, dim, 211, 1 << 20, dtype, CPU)


def resident_bytes(address, size):
    """Of these pages, how much the system backs."""
    pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    code = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(size), pages
    )
    if code:
        assert ctypes.get_errno() == errno.ENOMEM, "they are there, but cannot be asked for"
        return 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@every_family
def test_every_bit_is_that_of_a_sequence_cache(family):
    model, tokens = HFModel(build(family)), prompt(70)
    found = []
    for kind in (SequenceCache, SlabCache):
        recorder = Recorder(model.shape, size=16, start=0)
        cache = kind(model.shape, 80, recorder)
        rows = [prefill(model, cache, tokens, chunk=30)]
        for _ in range(5):
            rows.append(decode(model, [cache], rows[-1].argmax()[None])[0])
        kv = [x for i in range(model.shape.num_layers) for x in cache.view(i, cache.length)]
        found.append([*rows, *kv, *(block.data for _, block in recorder.take(cache.length))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_stored_is_loaded_into_it():
    tokens = prompt(64)
    with Engine(build("qwen3"), config=EngineConfig(block_tokens=16)) as engine:
        engine.generate(tokens[:50].tolist(), max_new_tokens=1)
        keys = engine.plain.keys(tokens[:48].tolist())
        cache = SlabCache(engine.model.shape, 80)
        placed = [Placed(key, i * 16) for i, key in enumerate(keys)]
        loader = Loader(engine.model, cache, engine.store, placed, 48)
        cache.advance(48)
        got = prefill(engine.model, cache, tokens[48:], loader=loader)
        loader.cancel()
        want = prefill(engine.model, SlabCache(engine.model.shape, 80), tokens)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)


def test_memory_is_taken_as_tokens_come_and_given_back_at_once():
    cache = SlabCache(shape(layers=4, heads=4, dim=64), 1 << 13)
    place = cache.slab.data_ptr(), cache.nbytes
    assert place[1] == 64 << 20
    assert resident_bytes(*place) == 0
    ones = torch.ones(4, 1 << 10, 64)
    for layer in range(4):
        cache.write(layer, 0, ones, ones)
    assert resident_bytes(*place) == 8 << 20  # an eighth
    cache.unload()
    assert cache.nbytes == resident_bytes(*place) == 0


def test_while_it_is_elsewhere_nothing_can_be_done_with_it():
    cache = SlabCache(shape(), 10)
    kv = torch.ones(2, 3, 16)
    cache.write(0, 0, kv, kv)
    slab = cache.slab
    cache.unload()
    assert not cache.loaded
    with pytest.raises(EngineError, match="bring it back first"):
        cache.view(0, 3)
    cache.load(slab)
    assert torch.equal(cache.view(0, 3).k, kv)
    cache.close()
    cache.close()
    assert not cache.loaded


def test_it_does_not_grow():
    cache, kv = SlabCache(shape(), 10), torch.ones(2, 11, 16)
    with pytest.raises(ValueError, match="room for 10 tokens, not for 11"):
        cache.write(0, 0, kv, kv)
