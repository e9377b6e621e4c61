"""Who gets a cache: what a request may take of the device and of the pool."""

import msgspec
import pytest

from engine import Engine, EngineConfig, PromptError, Segments
from engine.method import preset
from engine.sampling import Sampling
from kvstore.config import StoreConfig
from tests.engine.families import build, prompt

STORE = StoreConfig(host_bytes=1 << 26)
LAYER = 2 * 2 * 64 * 4  # bytes of a token's K and V in a layer
BLOCK = 2048  # its layers are stored one by one
HIDDEN = 96 * 4  # of its hidden state
TOKENS, NEW = 100, 9
KEPT = TOKENS + NEW - 1  # the last one's KV is never asked for


def engine(module, cache_bytes, **method):
    config = EngineConfig(cache_bytes=cache_bytes, block_tokens=BLOCK, store=STORE)
    sparse = preset("headrace", budget=40, **method)
    return Engine(
        module, None, msgspec.structs.replace(config, method=sparse, pinned_bytes=8 << 20)
    )


def running(engine, *asked):
    return [engine.accept(p, NEW, Sampling(), ()) for p in asked]


@pytest.mark.parametrize("dense_layers", [0, 1, 7])
def test_a_sparse_request_takes_hidden_states_two_layers_and_those_that_stay_dense(dense_layers):
    module, asked = build("llama", num_hidden_layers=8), prompt(TOKENS).tolist()
    passing = TOKENS * HIDDEN + KEPT * LAYER * min(2, 8 - dense_layers)
    needed = passing + KEPT * LAYER * dense_layers
    with engine(module, needed, dense_layers=dense_layers) as fits:
        assert len(fits.generate(asked, max_new_tokens=NEW)[0].tokens) == NEW
    with (
        engine(module, needed - 1, dense_layers=dense_layers) as short,
        pytest.raises(PromptError, match=f"needs {needed} bytes of KV and hidden.*cache_bytes"),
    ):
        short.generate(asked, max_new_tokens=NEW)


def test_a_model_with_no_layer_to_select_in_takes_its_kv_alone():
    module, asked = build("mistral-window"), prompt(TOKENS).tolist()
    with engine(module, KEPT * LAYER * 3) as fits:
        assert len(list(fits.memory.groups(running(fits, asked)))) == 1
    with engine(module, KEPT * LAYER * 3 - 1) as short, pytest.raises(PromptError, match="of KV,"):
        list(short.memory.groups(running(short, asked)))


def test_dense_layers_of_all_requests_stay_and_one_prompt_at_a_time_is_read():
    module, asked = build("gemma3"), prompt(TOKENS).tolist()  # two layers of four have windows
    passing = TOKENS * HIDDEN + KEPT * LAYER * 2
    for together in (1, 2, 3):
        with engine(module, passing + together * KEPT * LAYER * 2) as one:
            groups = list(one.memory.groups(running(one, *[asked] * 3)))
            assert len(groups[0]) == together
            assert sum(map(len, groups)) == 3


def test_a_prompt_of_segments_has_all_layers_on_the_device_while_it_is_blended():
    chunks = [prompt(30, seed=i).tolist() for i in range(2)]
    asked = Segments(prompt(9).tolist(), chunks, prompt(13).tolist())
    needed = (len(asked.tokens) + NEW - 1) * LAYER * 3
    with engine(build("llama"), needed) as fits:
        assert len(fits.generate(asked, max_new_tokens=NEW)[0].tokens) == NEW
    with engine(build("llama"), needed - 1) as short, pytest.raises(PromptError, match="cache_b"):
        short.generate(asked, max_new_tokens=NEW)
