"""Layers that share KV: it is kept once, whoever attends to it, and the answers are the model's."""

import json
from dataclasses import replace

import msgspec
import pytest
import torch

from engine import Engine
from engine.blend.segments import Segments
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.method import preset
from engine.model.altup import AltUpLayer
from engine.model.check import check
from engine.model.hf import HFModel, ownership
from engine.prefill import prefill_layers
from engine.sparse.cache import SparseCache, pool_shape, sparse_layers
from engine.sparse.layer import SparseLayer
from kvstore.config import StoreConfig
from kvstore.pool.device import DeviceTier
from tests.engine import oracle
from tests.engine.families import build, prompt

OWNERS = [0, 1, 2, 1, 2, 1]  # of six layers, of which windows and full attention take turns
PROMPTS = [prompt(90), prompt(41)]


@pytest.fixture(scope="module")
def module():
    return build("gemma3n")


@pytest.fixture(scope="module")
def expected(module):
    return oracle.generate(module, PROMPTS, 10)


def answers(engine, prompts=PROMPTS, **settings):
    return engine.generate([p.tolist() for p in prompts], max_new_tokens=10, **settings)


def assert_same(module, found, expected):
    for asked, ours, theirs in zip(PROMPTS, found, expected):
        oracle.assert_same_answer(module, asked, ours.tokens, theirs)


@pytest.mark.parametrize("shared", [0, 2, 3, 4])
def test_a_block_has_the_kv_of_each_owner_once(shared):
    """And its bytes are those of so many layers, in memory and on disk."""
    module = build("gemma3n", num_kv_shared_layers=shared)
    owners = 6 - shared
    with Engine(module, config=EngineConfig(block_tokens=8)) as engine:
        first = answers(engine)
        assert engine.identity.block_shape(8) == (owners, 2, 2, 8, 64)
        blocks, host = (90 + 9) // 8 + (41 + 9) // 8, engine.stats().tiers["host"]
        assert host.blocks == blocks
        assert host.used_bytes == blocks * owners * (2 * 2 * 8 * 64 * 4)
        again = answers(engine)
    assert [x.stats.cached_tokens for x in again] == [88, 40]
    assert [x.tokens for x in again] == [x.tokens for x in first]
    assert_same(module, first, oracle.generate(module, PROMPTS, 10))


def test_the_map_of_owners_is_in_the_identity(module):
    with Engine(module) as engine:
        attention = json.loads(engine.identity.attention)
        assert attention["owners"] == OWNERS == [layer.owner for layer in engine.model.layers]
    with Engine(build("gemma3")) as engine:
        assert "owners" not in json.loads(engine.identity.attention)


def test_bf16_from_disk_in_a_new_engine(tmp_path):
    module = build("gemma3n", dtype=torch.bfloat16)
    config = EngineConfig(block_tokens=8, store=StoreConfig(disk_path=str(tmp_path)))
    found = []
    for _ in range(2):
        with Engine(module, config=config) as engine:
            found.append(answers(engine))
    assert [x.stats.cached_tokens for x in found[1]] == [88, 40]
    assert [x.tokens for x in found[0]] == [x.tokens for x in found[1]]


METHODS = {
    "on the host": ("headrace", {"attend_on": "host"}),
    "on the device": ("headrace", {"attend_on": "device"}),
    "keys from factors": ("shadowkv", {"rank": 64, "values": "exact"}),
    "pages": ("quest", {"attend_on": "device"}),
}


@pytest.mark.parametrize("prefetch", ["none", "step", "layer"])
@pytest.mark.parametrize("name", METHODS)
def test_at_full_budget_the_answers_are_the_models(name, prefetch, module, expected):
    preset_name, changes = METHODS[name]
    method = preset(preset_name, budget=1000, prefetch=prefetch, **changes)
    with Engine(module, config=EngineConfig(method=method)) as engine:
        assert engine.memory.pool.shape.num_layers == 1
        assert_same(module, answers(engine), expected)


@pytest.mark.parametrize("prefetch", ["step", "layer"])
def test_guesses_never_change_what_is_computed(prefetch, module):
    found = []
    for guess in ("none", prefetch):
        method = preset("oracle", budget=24, sinks=2, window=4, attend_on="device", prefetch=guess)
        with Engine(module, config=EngineConfig(method=method)) as engine:
            found.append(answers(engine))
    assert [x.tokens for x in found[0]] == [x.tokens for x in found[1]]
    assert found[1][0].stats.sparse.guessed > 0


def test_every_layer_selects_by_its_own_query_in_the_index_of_the_owner(module, monkeypatch):
    asked = []
    select = SparseLayer.select

    def noted(layer, query):
        tokens = select(layer, query)
        asked.append((layer, query.rotated, tokens))
        return tokens

    monkeypatch.setattr(SparseLayer, "select", noted)
    method = preset("oracle", budget=16, sinks=2, window=4, prefetch="none")
    with Engine(module, config=EngineConfig(method=method)) as engine:
        [found] = answers(engine, PROMPTS[:1])
    assert len(asked) == 3 * 9, "three layers a step, nine steps"
    assert len({id(layer) for layer, _, _ in asked}) == 1
    for number in range(0, len(asked), 3):
        chosen = [tokens for _, _, tokens in asked[number : number + 3]]
        assert not torch.equal(chosen[0], chosen[1])
        assert not torch.equal(chosen[1], chosen[2])
    assert found.stats.sparse.steps == 9
    assert found.stats.sparse.selected == 9 * 3 * 2 * 16


def noted(function, where, what):
    return lambda *args: (where.append(what), function(*args))[1]


def test_kv_moves_to_the_pool_when_its_last_reader_has_read_it(module, monkeypatch):
    model, method = HFModel(module), preset("headrace", budget=1000)
    pool = DeviceTier(pool_shape(model, method), 1 << 24)
    cache, done = SparseCache(model, 100, method, pool), []
    for layer in model.layers:
        finish = layer.finish
        monkeypatch.setattr(layer, "finish", noted(finish, done, model.layers.index(layer)))
    complete = SparseCache.complete
    monkeypatch.setattr(SparseCache, "complete", lambda *a: (done.append(f"{a[1]}"), complete(*a)))
    row = prefill_layers(model, cache, prompt(90), chunk=1000)
    assert done == [0, "0", 1, 2, 3, 4, "2", 5, "1"]
    wanted = oracle.logits(module, prompt(90))[-1]
    torch.testing.assert_close(row, wanted, rtol=0, atol=oracle.TOLERANCE)
    cache.close()


@pytest.mark.parametrize("method", ["dense", "headrace"])
def test_behind_the_last_kv_only_the_last_token_of_a_chunk_goes_on(method, module, monkeypatch):
    """Half of the layers make no KV, so nobody asks for what most tokens are there."""
    rows = []
    with Engine(module, config=EngineConfig(prefill_chunk=32, method=preset(method))) as engine:
        for layer in engine.model.layers:
            qkv = layer.qkv
            monkeypatch.setattr(layer, "qkv", lambda x, f=qkv: (rows.append(len(x)), f(x))[1])
        engine.generate([PROMPTS[0].tolist()], max_new_tokens=1)
    if method == "dense":
        assert rows == [32] * 3 + [1] * 3 + [32] * 3 + [1] * 3 + [26] * 3 + [1] * 3
    else:  # layer by layer
        assert rows == [32, 32, 26] * 3 + [1] * 3


def test_logits_of_all_tokens_go_all_the_way(module):
    with Engine(module, config=EngineConfig(prefill_chunk=32)) as engine:
        found = engine.logits(PROMPTS[0])
    wanted = oracle.logits(module, PROMPTS[0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=oracle.TOLERANCE)


def test_chunks_are_reused_in_another_order(module):
    """As of any model: at share 1 the answer is the model's, below it KV of chunks is reused."""
    a, b, question = prompt(64).tolist(), prompt(48).tolist(), prompt(9).tolist()
    with Engine(module, config=EngineConfig(block_tokens=16)) as engine:
        engine.precompute([a, b])
        segments = Segments((), (tuple(b), tuple(a)), tuple(question))
        whole, some = (
            engine.generate(segments, max_new_tokens=4, blend=replace_share(engine, share))[0]
            for share in (1.0, 0.2)
        )
        flat = torch.tensor(segments.tokens)
    [wanted] = oracle.generate(module, [flat], 4)
    oracle.assert_same_answer(module, flat, whole.tokens, wanted)
    assert some.stats.blend.loaded
    assert some.stats.blend.reused_tokens >= 48
    assert 0 < some.stats.blend.charged <= 0.2


def replace_share(engine, share):
    return msgspec.structs.replace(engine.config.blend, share=share, controller=False)


# the check


def spoil_owner(layer):
    layer.owner = 0


def spoil(name, value):
    return lambda layer: setattr(layer, name, value)


def spoil_twin(name):
    return lambda layer: setattr(layer._twin, name, torch.nn.Identity())


def spoil_norm_of_values(layer):
    layer._layer._family = replace(layer._layer._family, v_norm=False)


WRONG = {
    "owner": (3, spoil_owner),
    "norm of values": (1, spoil_norm_of_values),
    "active stream": (2, spoil("_active", 0)),
    "scale of what is told": (0, spoil("_scaled", False)),
    "laurel": (4, spoil_twin("laurel")),
    "norm of the own input": (5, spoil_twin("post_per_layer_input_norm")),
    "own input": (2, spoil("_own", slice(288, 304))),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_with_one_piece_wrong_is_refused(name, module):
    model, (where, change) = HFModel(module), WRONG[name]
    assert isinstance(model.layers[where], AltUpLayer)
    change(model.layers[where])
    with pytest.raises(ModelError, match=f"layer {where} is not reproduced"):
        check(model)


def test_wrong_ends_are_refused(module):
    model = HFModel(module)
    begin = model.streams.begin
    model.streams.begin = lambda tokens: begin(tokens) * 1.001
    with pytest.raises(ModelError, match="the input of layer 0"):
        check(model)
    model = HFModel(module)
    model.streams.end = lambda x: x[:, :96]
    with pytest.raises(ModelError, match="logits"):
        check(model)


def test_tokens_without_an_own_input_take_that_of_the_first():
    """By a model that has all own inputs, those from 200 on equal to the first."""
    fewer, all_of_them = build("gemma3n", vocab_size_per_layer_input=200), build("gemma3n")
    table, state = "model.embed_tokens_per_layer.weight", all_of_them.state_dict()
    state[table][200:] = state[table][0]
    fewer.load_state_dict(state | {table: state[table][:200]})
    tokens = torch.arange(190, 211)
    with Engine(fewer) as engine:
        torch.testing.assert_close(
            engine.logits(tokens), oracle.logits(all_of_them, tokens), rtol=1e-4, atol=1e-4
        )


def test_layers_that_share_kv_must_attend_to_it_alike():
    module = build("gemma3n")
    module.model.layers[3].self_attn.scaling = 0.5
    with pytest.raises(ModelError, match="layer 3 attends to another layer's KV with a scale"):
        HFModel(module)


def test_of_every_layer_the_owner_is_the_last_of_its_kind(module):
    found = ownership(module.model.layers, module.config)
    assert [owner for owner, _ in found] == OWNERS
    assert [owns for _, owns in found] == [True] * 3 + [False] * 3
    assert sparse_layers(HFModel(module), preset("headrace")) == [1]
