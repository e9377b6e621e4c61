"""Load what is stored of a prompt, or compute it: by measured speeds, and both right."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.breakeven import LEAST_S, BreakEven
from engine.config import EngineConfig
from engine.engine import Engine
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, items

KEYS = chain(range(40))
TOKEN_BYTES = 1000


@pytest.fixture
def speeds():
    with TieredStore([HostTier(1 << 20)]) as store:
        store.put(items(KEYS))
        yield BreakEven(store, TOKEN_BYTES, steps=4)


def test_what_is_not_measured_is_loaded(speeds):
    assert speeds.worth(KEYS, 44)
    speeds.computed(100, 1e-6, 0)
    assert speeds.worth(KEYS, 44)
    assert (speeds.choices().loaded, speeds.choices().computed) == (2, 0)


@pytest.mark.parametrize("load_s", [0.5, 1.0, 5.0, 9.0, 20.0])
@pytest.mark.parametrize("token_s", [0.01, 0.1, 1.0])
def test_the_faster_way_is_taken(speeds, load_s, token_s):
    speeds.computed(44, 44 * token_s, 0)
    speeds.loaded(KEYS, load_s)
    fresh_s, full_s = 4 * token_s, 44 * token_s
    steps = [max(load_s, fresh_s) / 4] * 3  # loading and computing overlap, layer by layer
    loading_s = load_s / 4 + sum(steps) + fresh_s / 4
    assert speeds.worth(KEYS, 44) == (loading_s < full_s)


def test_what_is_soon_there_is_loaded_however_fast_prefill_is(speeds):
    speeds.computed(44, 1e-6, 0)
    speeds.loaded(KEYS, 0.9 * LEAST_S)
    assert speeds.worth(KEYS, 44)


def test_a_slow_tier_is_tried_again_for_a_bounded_part_of_the_time(speeds):
    speeds.computed(44, 1.0, 0)
    speeds.loaded(KEYS, 3.0)
    taken = [speeds.worth(KEYS, 44) for _ in range(300)]
    assert 2 <= sum(taken) <= 0.03 * 300 / 2


def test_nothing_stored_is_no_choice(speeds):
    assert not speeds.worth([], 44)
    assert speeds.choices().computed == 0


def test_where_loading_is_slow_the_engine_computes_the_same():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    prompt = [number * 7 % 64 for number in range(65)]
    with Engine(LlamaForCausalLM(shape), None, EngineConfig(block_tokens=16)) as engine:
        (first,) = engine.generate(prompt, max_new_tokens=4)
        (loaded,) = engine.generate(prompt, max_new_tokens=4)
        assert loaded.stats.cached_tokens == 64
        keys = engine.plain.keys(prompt)
        for _ in range(8):
            engine.speeds.loaded(keys, 1000.0)
        (computed,) = engine.generate(prompt, max_new_tokens=4)
        assert computed.stats.cached_tokens == 0
        assert first.tokens == loaded.tokens == computed.tokens
        stats = engine.stats()
        assert (stats.loaded_starts, stats.computed_starts) == (1, 1)
