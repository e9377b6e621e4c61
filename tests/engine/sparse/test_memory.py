"""What it takes to read a prompt, to move it to the pool and to index it, besides what stays."""

from contextlib import closing

import pytest
import torch

from engine.method import preset
from engine.model.hf import HFModel
from engine.prefill import prefill_layers
from engine.sparse.cache import SparseCache, pool_shape
from kvstore.pool.pool import Pool
from tests.alive import taken
from tests.engine.families import build, prompt

METHODS = {
    "headrace": preset("headrace"),
    "lowrank + scalar + int4": preset("headrace", keys="lowrank", values="int4"),
    "shadowkv": preset("shadowkv"),
    "quest": preset("quest"),
}


def filled(method, tokens):
    """What filling a layer takes, and what it may: its keys once, and what stays."""
    model = HFModel(build("llama", num_key_value_heads=4, head_dim=128))
    with closing(Pool(pool_shape(model, method), 2 * tokens * model.shape.kv_bytes_per_token)) as p:
        cache = SparseCache(model, 1, method, p)
        k, v = torch.randn(2, model.shape.num_kv_heads, tokens, model.shape.head_dim)
        memory = taken(lambda: cache.fill(0, k, v))
        granted = k.nbytes + cache.device_bytes
        cache.close()
    return memory, granted


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_filling_a_layer_takes_more_for_a_longer_prompt_is_what_it_keeps_more(method):
    """Nor may the heap be cut up: a small result that outlives each of many large temporaries,
    or a buffer that is outgrown again and again, leaves holes that add up to hundreds of MiB.
    """
    (few, least), (many, granted) = filled(method, 4096), filled(method, 16384)
    assert many.most - few.most <= 1.1 * (granted - least)
    assert many.heap - few.heap <= 1.5 * (granted - least)


LAYERS, TOKENS = 8, 1024


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_reading_a_prompt_takes_its_hidden_states_and_one_layer_of_kv_beside_what_filling_takes(
    method,
):
    """Of eight layers; that filling one takes no more than another's keys is tested above."""
    model = HFModel(build("llama", num_hidden_layers=LAYERS, num_key_value_heads=4, head_dim=128))
    hidden, layer = TOKENS * 96 * 4, TOKENS * model.shape.kv_bytes_per_token // LAYERS
    with closing(Pool(pool_shape(model, method), 2 * LAYERS * layer)) as p:
        cache = SparseCache(model, TOKENS, method, p)
        read = taken(lambda: prefill_layers(model, cache, prompt(TOKENS), chunk=64))
        stays = cache.device_bytes
        cache.close()
    filling, _ = filled(method, TOKENS)
    assert read.most - filling.most <= 1.1 * (hidden + layer + stays)
