"""The engine with a sparse method, as its users see it."""

import msgspec
import numpy as np
import pytest
import torch

from engine import Engine, EngineConfig, PromptError
from engine.errors import ConfigError, ModelError
from engine.method import preset
from engine.model.hf import HFModel
from engine.request import listed
from engine.sampling import Sampling
from engine.sparse import compiled as compiled_ahead
from engine.sparse.cache import SparseCache, pool_shape
from engine.sparse.indexes import make_index
from kvstore.config import StoreConfig
from kvstore.errors import PoolFull
from kvstore.pool.device import DeviceTier
from tests.engine.families import build, prompt

BIG = StoreConfig(host_bytes=1 << 26)


@pytest.mark.parametrize(("name", "count"), [("dense", 0), ("headrace", 2)])
def test_what_sparse_steps_run_in_c_is_compiled_before_the_first_answer(name, count, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiled_ahead, "library", compiled.append)
    with Engine(build("llama"), None, EngineConfig(store=BIG, method=preset(name))):
        assert len(compiled) == count
        assert all(source.exists() for source in compiled)


@pytest.mark.parametrize("name", ["headrace", "shadowkv"])
def test_an_engine_with_a_sparse_method_at_full_budget_answers_as_a_dense_one(name):
    module, asked = build("llama"), [prompt(150), prompt(64), prompt(301)]
    changes = dict(budget=10_000, hot=1.0, prefetch="layer", rank=1000)
    method = preset(name, **changes, options={"outlier_chunks": 0} if name == "shadowkv" else {})
    config = EngineConfig(block_tokens=16, store=BIG, method=method, pinned_bytes=64 << 20)
    with Engine(module, None, EngineConfig(block_tokens=16, store=BIG)) as plain:
        want = [x.tokens for x in plain.generate([t.tolist() for t in asked], max_new_tokens=30)]
    with Engine(module, None, config) as engine:
        for warm in (False, True):  # the second time the prompts' KV comes from the store
            answers = engine.generate([t.tolist() for t in asked], max_new_tokens=30)
            assert [x.tokens for x in answers] == want
            assert all((x.stats.cached_tokens > 0) == warm for x in answers)
            assert all(x.stats.sparse.steps == 29 for x in answers)
        assert engine.memory.pool.used_bytes == 0


def test_a_cancelled_sparse_request_frees_its_blocks():
    config = EngineConfig(store=BIG, method=preset("headrace", prefetch="layer"))
    config = msgspec.structs.replace(config, pinned_bytes=8 << 20)
    with Engine(build("llama"), None, config) as engine:
        stream = engine.stream(prompt(200).tolist(), max_new_tokens=50)
        next(stream)
        next(stream)
        assert engine.memory.pool.used_bytes > 0
        stream.close()
        assert engine.memory.pool.used_bytes == 0


def test_an_answer_that_has_begun_keeps_its_room_in_the_pool_from_one_that_comes_later():
    method, asked = preset("headrace", budget=64), prompt(150).tolist()
    with Engine(build("llama"), None, EngineConfig(store=BIG, method=method)) as engine:
        want = [event.token for event in engine.stream(asked, max_new_tokens=150)]
        blocks = -(-(len(asked) + 150) // engine.memory.pool.shape.block_tokens)
        needed = blocks * engine.memory.pool.shape.block_bytes
    config = EngineConfig(store=BIG, method=method, pinned_bytes=needed + needed // 2)
    with Engine(build("llama"), None, config) as engine:
        first = engine.stream(asked, max_new_tokens=150)
        got = [next(first).token]
        later = engine.stream(prompt(151).tolist(), max_new_tokens=150)
        with pytest.raises(PoolFull, match="raise pinned_bytes, or wait for a request to end"):
            next(later)
        assert engine.memory.pool.open_leases == 1
        assert got + [event.token for event in first] == want
        assert engine.memory.pool.used_bytes == 0


def test_a_pool_too_small_for_a_request_is_refused_by_its_setting_and_one_with_a_spill_is_not(
    tmp_path,
):
    module, asked = build("llama"), prompt(400).tolist()
    small = EngineConfig(store=BIG, method=preset("headrace", budget=5000), pinned_bytes=1 << 20)
    with Engine(module, None, small) as engine, pytest.raises(PromptError, match="pinned_bytes"):
        engine.generate(asked, max_new_tokens=5)
    spilling = msgspec.structs.replace(small, spill_path=str(tmp_path / "s"), spill_bytes=1 << 26)
    with Engine(module, None, spilling) as engine, Engine(module) as plain:
        want = plain.generate(asked, max_new_tokens=5)[0].tokens
        assert engine.generate(asked, max_new_tokens=5)[0].tokens == want
        assert engine.memory.pool.stats().promotions > 0


def test_small_pools_run_one_group_of_requests_after_the_other():
    config = EngineConfig(store=BIG, method=preset("headrace"), pinned_bytes=2 << 20)
    with Engine(build("llama"), None, config) as engine:
        asked = [prompt(150 + i).tolist() for i in range(5)]
        groups = list(engine.memory.groups([engine.accept(p, 5, Sampling(), ()) for p in asked]))
        assert 1 < len(groups) < 5
        assert len(engine.generate(asked, max_new_tokens=5)) == 5


def test_the_method_is_read_from_toml_as_a_preset_with_changes(tmp_path):
    file = tmp_path / "headrace.toml"
    file.write_text('[method]\npreset = "shadowkv"\nbudget = 0.05\nrank = 32\n')
    method = EngineConfig.from_toml(file).method
    assert (method.index, method.keys, method.budget, method.rank) == (
        "landmarks",
        "lowrank",
        0.05,
        32,
    )
    file.write_text('[method]\nindex = "quest"\n[method.options]\npage = 8\n')
    assert EngineConfig.from_toml(file).method.options == {"page": 8}
    for bad in ('preset = "shadow"', "budgets = 3", 'preset = "quest"\nbudget = "many"'):
        file.write_text(f"[method]\n{bad}\n")
        with pytest.raises(ConfigError):
            EngineConfig.from_toml(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method = 5", "method"),
        ('method = "preset"', "method"),
        ('preset = ["x"]', "no method"),
        ('preset = "headrace"\nname = "x"', "no setting name"),
        ('preset = "headrace"\nbudget = inf', "method.budget"),
        ('preset = "headrace"\nhot = inf', "method.hot"),
        ('preset = "headrace"\nhot = nan', "method.hot"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(tmp_path, text, said):
    path = tmp_path / "engine.toml"
    path.write_text(text if text.startswith("method") else f"[method]\n{text}")
    with pytest.raises(ConfigError, match=said):
        EngineConfig.from_toml(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shadowkv", {"chunk": 0}),
        ("shadowkv", {"chunk": "x"}),
        ("quest", {"page": 16.5}),
        ("headrace", {"seed": 1.5}),
        ("headrace", {"key_space": "foo"}),
        ("a2ats", {"centroids": 1.5}),
        ("pqcache", {"points": 0}),
        ("a2ats", {"seed": 2**40}),
        ("a2ats", {"ridge": -5}),
        ("a2ats", {"ridge": "x"}),
        ("a2ats", {"guard": 1}),
        ("pqcache", {"codebook": 1}),
        ("headrace", {"device": "cpu"}),
        ("oracle", {"bits": 2}),
    ],
)
def test_options_of_an_index_that_cannot_be_are_refused(name, options):
    [option] = options
    shape = HFModel(build("llama")).shape
    with pytest.raises(ConfigError, match=f"method.options of .*: {option} is"):
        make_index(preset(name, options=options), shape, 100)


@pytest.mark.parametrize(
    ("name", "options"), [("headrace", {"bits": 3}), ("pqcache", {"subspaces": 5})]
)
def test_an_engine_whose_index_cannot_be_of_the_model_is_not_made(name, options):
    """A server would start, and every request would fail behind its whole prompt."""
    with pytest.raises(ConfigError, match=r"method\.options of"):
        Engine(build("llama"), None, EngineConfig(store=BIG, method=preset(name, options=options)))


@pytest.mark.parametrize("wrong", [{"sinks": -3}, {"window": 0}, {"top_p": 7.0}])
@pytest.mark.parametrize("budget", [64, 0.5])
def test_a_choice_that_cannot_be_is_refused_also_where_the_budget_is_a_share(budget, wrong):
    with pytest.raises(ConfigError, match="method: "):
        preset("headrace", budget=budget, **wrong)


def test_outliers_leave_room_for_what_is_always_attended_to():
    method = preset("shadowkv", sinks=100, window=100, budget=210, rank=1000)
    config = EngineConfig(store=BIG, method=method, pinned_bytes=64 << 20)
    with Engine(build("llama"), None, config) as engine:
        assert len(engine.generate(prompt(400).tolist(), max_new_tokens=4)[0].tokens) == 4


def test_a_budget_above_all_positions_takes_memory_for_these_only():
    model, used = HFModel(build("llama")), []
    for budget in (model.shape.max_positions, 10**9):
        method = preset("shadowkv", budget=budget, rank=1000, options={"outlier_chunks": 0})
        pool = DeviceTier(pool_shape(model, method), 64 << 20)
        cache = SparseCache(model, 200, method, pool)
        layer = cache.layer(0)
        s = model.shape
        layer.fill(*torch.randn(2, s.num_kv_heads, 150, s.head_dim))
        used.append(cache.device_bytes)
        cache.close()
        pool.close()
    assert used[0] == used[1]


@pytest.mark.parametrize("name", ["headrace", "a2ats", "pqcache", "shadowkv"])
def test_numbers_that_are_not_finite_are_told_whatever_the_index_makes_of_them(name):
    module, bad = build("llama"), 100  # a token that the load-time check does not meet
    module.model.embed_tokens.weight.data[bad] = torch.inf
    options = {"bits": 4} if name == "pqcache" else {"centroids": 16} if name == "a2ats" else {}
    config = EngineConfig(store=BIG, method=preset(name, options=options), pinned_bytes=8 << 20)
    with Engine(module, None, config) as engine:
        asked = [*prompt(60).tolist(), bad, *prompt(60, seed=1).tolist()]
        with pytest.raises(ModelError, match="not finite: load it with dtype"):
            engine.generate(asked, max_new_tokens=2)
        assert engine.memory.pool.used_bytes == 0


def test_a_head_that_asks_for_nothing_has_a_codebook_too():
    module = build("llama")
    module.model.layers[1].self_attn.q_proj.weight.data[: 2 * 64] = 0
    method = preset("a2ats", options={"centroids": 16})
    config = EngineConfig(store=BIG, method=method, pinned_bytes=8 << 20)
    with Engine(module, None, config) as engine, Engine(module) as plain:
        [got], [want] = (x.generate(prompt(100).tolist()) for x in (engine, plain))
        assert got.tokens == want.tokens


def test_prompts_may_be_tensors_and_arrays():
    for kind in (torch.tensor, np.array):
        assert len(listed([kind([5]), kind([6])])) == 2
        assert len(listed(kind([5, 6]))) == 1
        assert len(listed([*kind([5, 6])])) == 1
