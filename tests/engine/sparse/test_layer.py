"""Sparse decode: at full budget it is dense, whatever finds, holds or moves the KV."""

import functools
import threading

import pytest
import torch

from engine.attention import attend_part, attend_token_torch, merge
from engine.cache import SequenceCache
from engine.decode import decode
from engine.errors import ConfigError, EngineError
from engine.method import PRESETS, Method, preset
from engine.model.hf import HFModel
from engine.model.pieces import AttentionSpec
from engine.model.rope import FarTable
from engine.prefill import prefill
from engine.sparse.cache import SparseCache, pool_shape, sparse_layers
from engine.sparse.choice import unturned
from kvstore.pool.device import DeviceTier
from kvstore.pool.spill import Spill
from retrieval.select import top_tokens
from retrieval.vq import VQIndex
from tests.engine.families import CASES, build, prompt

SPARSE = [name for name in PRESETS if name != "dense"]
FULL = dict(budget=100_000, hot=1.0)
EXACT = dict(shadowkv=dict(rank=10_000, options={"chunk": 8, "outlier_chunks": 0}))


def full(name, **changes):
    return preset(name, **(FULL | EXACT.get(name, {}) | changes))


class Sparse:
    """A model with a pool, and caches of its own; closed at the end."""

    def __init__(self, module, method, *, pool_bytes=64 << 20, spill=None, predict=None):
        self.model, self.method, self.predict = HFModel(module), method, predict
        self.pool = DeviceTier(pool_shape(self.model, method), pool_bytes, spill=spill)
        self.caches = []

    def cache(self, capacity=700):
        made = SparseCache(self.model, capacity, self.method, self.pool, predict=self.predict)
        self.caches.append(made)
        return made

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for cache in self.caches:
            cache.close()
        assert self.pool.used_bytes == 0
        self.pool.close()


def generated(model, caches, prompts, count, *, forced=None, chunk=97):
    """Logits of every step [count + 1, B, vocab]; greedy, or along the tokens `forced`."""
    first = [prefill(model, c, p, chunk=chunk) for c, p in zip(caches, prompts)]
    for cache in caches:
        cache.finalize()
    rows = [torch.stack(first)]
    for i in range(count):
        tokens = rows[-1].argmax(-1) if forced is None else forced[i]
        rows.append(decode(model, caches, tokens))
    return torch.stack(rows)


def dense(module, prompts, count):
    model = HFModel(module)
    caches = [SequenceCache(model.shape, 64) for _ in prompts]
    return generated(model, caches, prompts, count)


@functools.cache
def dense_of(family, lengths, count):
    """A model, its prompts, and what it makes of them: once for all methods."""
    module, prompts = build(family), [prompt(n) for n in lengths]
    return module, prompts, dense(module, prompts, count)


def agree(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance


GLOBAL = [family for family in CASES if sparse_layers(HFModel(build(family)), preset("headrace"))]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("family", GLOBAL)
def test_at_full_budget_every_method_is_dense_in_every_family(family, name):
    module, prompts, want = dense_of(family, (150, 31), 5)
    with Sparse(module, full(name)) as s:
        got = generated(s.model, [s.cache(), s.cache()], prompts, 5, forced=want.argmax(-1))
    agree(got, want)


@pytest.mark.parametrize("attend_on", ["host", "device"])
@pytest.mark.parametrize("prefetch", ["none", "step", "layer"])
@pytest.mark.parametrize("name", ["headrace", "quest", "a2ats"])
def test_where_it_attends_and_what_is_prefetched_change_nothing(name, prefetch, attend_on):
    module, prompts, want = dense_of("llama", (1, 14, 300, 127), 8)  # one outgrows the ends
    with Sparse(module, full(name, attend_on=attend_on, prefetch=prefetch)) as s:
        caches = [s.cache() for _ in prompts]
        agree(generated(s.model, caches, prompts, 8, forced=want.argmax(-1)), want)


@pytest.mark.parametrize("name", ["headrace", "shadowkv", "quest"])
def test_in_bf16_full_budget_is_dense_to_the_dtype(name):
    module, prompts = build("qwen3", dtype=torch.bfloat16), [prompt(200), prompt(90)]
    want = dense(module, prompts, 10)
    with Sparse(module, full(name)) as s:
        got = generated(s.model, [s.cache(), s.cache()], prompts, 10, forced=want.argmax(-1))
    assert (got - want).float().norm() <= 0.03 * want.float().norm()


@pytest.mark.parametrize("name", ["headrace", "shadowkv"])
def test_the_cut_of_a_prompt_into_chunks_changes_nothing(name):
    module, prompts = build("llama"), [prompt(260)]
    method = preset(name, budget=60, rank=48, options=EXACT.get(name, {}).get("options", {}))
    with Sparse(module, method) as s:
        one = generated(s.model, [s.cache()], prompts, 8, chunk=1000)
        cut = generated(s.model, [s.cache()], prompts, 8, chunk=33, forced=one.argmax(-1))
    agree(cut, one)


def test_a_budget_below_the_context_attends_to_exactly_so_many_tokens():
    module = build("llama")
    with Sparse(module, preset("headrace", budget=50)) as s:
        cache = s.cache()
        generated(s.model, [cache], [prompt(400)], 7)
        layers, heads = len(s.model.layers), s.model.shape.num_kv_heads
        assert cache.stats.selected == 7 * layers * heads * 50
        assert cache.stats.steps == 7


def masked(layer, query, kv, tokens, spec):
    """Attention over chosen tokens only, by a mask over all."""
    scores = query.unflatten(0, (len(kv.k), -1)) @ kv.k.mT * spec.scale
    seen = torch.zeros(kv.k.shape[:2], dtype=torch.bool).scatter_(1, tokens, True)
    out = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ kv.v
    return out.flatten(0, 1)


@pytest.mark.parametrize("attend_on", ["host", "device"])
@torch.inference_mode()
def test_a_choice_of_tokens_is_attended_to_as_a_mask_would(attend_on):
    module = build("llama-80-linear")
    with Sparse(module, preset("oracle", budget=40, attend_on=attend_on)) as s:
        cache = s.cache()
        generated(s.model, [cache], [prompt(300)], 3)
        for i in range(3):
            layer = cache.layer(i)
            kv = cache._lease.read(i, 0, layer.length)
            query = layer.last
            tokens = layer.select(query)
            spec = s.model.layers[i].attention
            want = masked(layer, query.rotated, kv, tokens, spec)
            torch.testing.assert_close(layer.attend(query), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefetch", ["step", "layer"])
def test_a_random_guess_changes_no_logit_and_is_counted_as_what_it_is(prefetch):
    module, prompts = build("llama"), [prompt(400)]
    generator = torch.Generator().manual_seed(0)

    def random(_, guess):
        return guess and type(guess)(*(torch.randn(x.shape, generator=generator) for x in guess))

    results = []
    for method, predict in [
        (preset("headrace", budget=40, attend_on="device"), None),
        (preset("headrace", budget=40, attend_on="device", prefetch=prefetch), None),
        (preset("headrace", budget=40, attend_on="device", prefetch=prefetch), random),
    ]:
        with Sparse(module, method, predict=predict) as s:
            cache = s.cache()
            results.append((generated(s.model, [cache], prompts, 25), cache.stats))
    (plain, alone), (guessed, right), (shot, wrong) = results
    assert torch.equal(plain, guessed)
    assert torch.equal(plain, shot)
    assert alone.guessed == 0 < right.guessed
    assert right.hits > alone.hits
    if prefetch == "layer":
        assert right.hits > wrong.hits
    assert alone.waited_s == 0


def test_a_long_answer_at_full_budget_is_dense():
    """ShadowKV's public code drops tokens after about a hundred."""
    module = build("llama", num_hidden_layers=1, max_position_embeddings=2048)
    want = dense(module, [prompt(40)], 300)
    with Sparse(module, full("headrace")) as s:
        agree(generated(s.model, [s.cache()], [prompt(40)], 300, forced=want.argmax(-1)), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_four_thousand_generated_tokens_at_full_budget_are_dense(name):
    module = build("llama", num_hidden_layers=1, max_position_embeddings=8192)
    want = dense(module, [prompt(200)], 4000)
    with Sparse(module, full(name)) as s:
        cache = s.cache()
        agree(generated(s.model, [cache], [prompt(200)], 4000, forced=want.argmax(-1)), want, 2e-4)


@pytest.mark.parametrize("attend_on", ["host", "device"])
def test_kv_that_overflows_to_disk_comes_back_as_it_was(tmp_path, attend_on):
    module, prompts = build("llama"), [prompt(500), prompt(420)]
    want = dense(module, prompts, 10)
    method = full("headrace", attend_on=attend_on)
    with Sparse(module, preset("headrace")) as probe:
        block = probe.pool.shape.block_bytes
    spill = Spill(tmp_path / "spill", 256 << 20)
    with Sparse(module, method, pool_bytes=3 * block, spill=spill) as s:  # of 8 and 7
        got = generated(s.model, [s.cache(), s.cache()], prompts, 10, forced=want.argmax(-1))
        assert s.pool.stats().promotions > 0
    agree(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("attend_on", ["host", "device"])
def test_with_a_tail_full_budget_is_dense_and_a_small_one_is_closer_to_it(attend_on, family):
    module, prompts = build(family, initializer_range=0.03), [prompt(400)]  # flat attention
    want = dense(module, prompts, 12)
    errors = {}
    for tail in (False, True):
        for budget in (60, 100_000):
            method = preset("headrace", budget=budget, hot=1.0, tail=tail, attend_on=attend_on)
            with Sparse(module, method) as s:
                got = generated(s.model, [s.cache()], prompts, 12, forced=want.argmax(-1))
            errors[tail, budget] = float((got - want).abs().max())
    assert errors[True, 100_000] < 1e-4
    assert errors[True, 60] < 0.5 * errors[False, 60]


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("keys", ["exact", "int8", "lowrank"])
def test_quantized_kv_is_close_at_full_budget(keys, values):
    module, prompts = build("llama"), [prompt(300)]
    want = dense(module, prompts, 10)
    with Sparse(module, full("headrace", keys=keys, values=values, rank=10_000)) as s:
        got = generated(s.model, [s.cache()], prompts, 10, forced=want.argmax(-1))
    error = float((got - want).norm() / want.norm())
    assert 0 < error < (0.2 if values == "int4" else 0.03)


def test_with_low_rank_keys_no_key_is_read_in_host_memory():
    module = build("llama")
    method = preset("shadowkv", budget=60, rank=32, options={"outlier_chunks": 1})
    with Sparse(module, method) as s:
        cache = s.cache()
        generated(s.model, [cache], [prompt(400)], 20)
        assert cache.stats.host_key_rows == 0
        assert cache.stats.fetched_bytes > 0
        assert s.pool.shape.layout.k is None


@torch.inference_mode()
def test_with_low_rank_keys_sinks_and_outliers_stay_exact_on_the_device():
    module = build("llama")
    method = preset("shadowkv", budget=200, rank=4, hot=1.0, options={"outlier_chunks": 2})
    with Sparse(module, method) as s, Sparse(module, preset("oracle")) as exact:
        ours, theirs = s.cache(), exact.cache()
        generated(exact.model, [theirs], [prompt(500)], 1)
        generated(s.model, [ours], [prompt(500)], 30)
        for i in range(3):
            layer = ours.layer(i)
            sinks = torch.arange(4).expand(2, -1)
            for kept in (sinks, layer.choice.index.outliers):
                assert kept.shape[1]
                slots, miss = layer.rows.hot.resolve(kept)
                assert not miss.any()
                torch.testing.assert_close(
                    layer.rows.hot.read(slots).k, theirs._lease.gather(i, kept).k, rtol=0, atol=1e-5
                )


@torch.inference_mode()
def test_a_windowed_index_is_asked_with_the_query_at_its_distance():
    module = build("qwen2-yarn")
    method = preset("a2ats", budget=40, distance=77, options={"centroids": 1024})
    with Sparse(module, method) as s, Sparse(module, preset("oracle")) as exact:
        ours, theirs = s.cache(), exact.cache()
        generated(exact.model, [theirs], [prompt(300)], 1)
        generated(s.model, [ours], [prompt(300)], 1)
        layer, rope = ours.layer(0), s.model.layers[0].rope
        keys = rope.unrotate(theirs._lease.read(0, 0, 301).k, 0)  # one key, one code: exact scores
        at = rope.table(torch.tensor([77]))
        query = rope.rotate(layer.last.unrotated[:, None], at)[:, 0]
        scores = (query.unflatten(0, (2, -1)) @ keys.mT).flatten(0, 1)[:, :300]
        torch.testing.assert_close(
            layer.choice.index.score(query)[:, :300], scores, rtol=0, atol=1e-3
        )
        want = top_tokens(
            layer.choice.index.score(query), layer.choice.policy, num_kv_heads=2, length=301,
            scale=s.model.layers[0].attention.scale * rope.scaling,
        )  # fmt: skip
        assert torch.equal(layer.select(layer.last), want)


def test_scores_of_any_key_space_have_the_scale_of_rotated_ones():
    """YaRN scales what it rotates: shares of attention, and top-p, would be too even without."""
    rope = HFModel(build("qwen2-yarn")).layers[0].rope
    assert rope.scaling != 1
    q, k = torch.randn(2, 1, 1, 64)  # at one position, so that rotation changes nothing else
    here, none = (rope.table(torch.tensor([n])) for n in (33, 0))
    want = (rope.rotate(q, here) * rope.rotate(k, here)).sum()
    for space, score in (
        ("rotated", want),
        ("windowed", (rope.rotate(q, none) * k).sum()),
        ("unrotated", (q * k).sum()),
    ):
        torch.testing.assert_close(score * unturned(space, rope), want, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_rotated_codebook_learns_from_queries_where_they_are(monkeypatch):
    asked = []
    calibrate = VQIndex.calibrate
    monkeypatch.setattr(VQIndex, "calibrate", lambda *a: asked.append(a[1]) or calibrate(*a))
    method = preset("a2ats", budget=40, options={"centroids": 16, "key_space": "rotated"})
    with Sparse(build("llama"), method) as s:
        cache = s.cache()
        generated(s.model, [cache], [prompt(300)], 0)
        newest = cache.layer(0).last.rotated
    torch.testing.assert_close(asked[0][:, -1], newest)


def test_nothing_of_a_layer_is_used_before_its_prefetch_has_ended():
    module = build("llama")
    ended, waits = [], threading.Event()
    with Sparse(module, preset("headrace", attend_on="device", prefetch="layer")) as s:
        cache = s.cache()
        generated(s.model, [cache], [prompt(100)], 1)
        layer, before = cache.layer(1), cache.layer(1).append
        cache.look_ahead(1, layer.last)
        cache._wait(1)
        layer.prefetch = lambda _: (waits.wait(5), ended.append("prefetch"))
        layer.append = lambda *a: (ended.append("append"), before(*a))
        timer = threading.Timer(0.2, waits.set)
        timer.start()
        decode(s.model, [cache], torch.tensor([5]))
        timer.join()
    assert ended == ["prefetch", "append"]
    assert cache.stats.waited_s > 0


def test_sliding_window_layers_keep_their_own_attention():
    module = build("gemma3")
    model = HFModel(module)
    assert sparse_layers(model, preset("headrace")) == [1, 3]
    assert sparse_layers(model, preset("headrace", dense_layers=2)) == [3]
    assert len(GLOBAL) == len(CASES) - 2  # those whose layers all have windows select nothing


def test_parts_of_a_context_merge_to_attention_over_all_of_it():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, generator=generator) for n in ((8, 64), (2, 300, 64), (2, 300, 64)))
    for spec in (AttentionSpec(0.125), AttentionSpec(0.5, softcap=20.0)):
        want = attend_token_torch(q, k, v, spec)
        for cuts in ([300], [1, 299], [100, 100, 100], [7, 1, 250, 42]):
            parts = zip(k.split(cuts, 1), v.split(cuts, 1))
            got = merge([attend_part(q, *part, spec) for part in parts])
            torch.testing.assert_close(got.out, want, rtol=0, atol=1e-5)
        nested = merge(
            [
                merge([attend_part(q, k[:, :9], v[:, :9], spec)]),
                attend_part(q, k[:, 9:], v[:, 9:], spec),
            ]
        )
        torch.testing.assert_close(nested.lse, got.lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2-yarn", "phi3-partial", "glm4"])
def test_far_tables_are_those_of_the_rope_and_its_inverse_undoes_it(family):
    layer = HFModel(build(family)).layers[0]
    positions = torch.tensor([0, 1, 511, 512, 513, 40_000, 131_071])
    near, far = layer.rope.table(positions), FarTable(layer.rope, 131_072).table(positions)
    for a, b in zip(near, far):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    x = torch.randn(2, len(positions), CASES[family][1].get("head_dim", 64))
    turned = layer.rope.rotate(x, near)
    back = layer.rope.rotate(turned, layer.rope.inverse(near))
    torch.testing.assert_close(back, x, rtol=0, atol=2e-5)


def test_attending_before_the_prompt_is_complete_is_an_error():
    module = build("llama")
    with Sparse(module, preset("headrace")) as s:
        cache = s.cache()
        prefill(s.model, cache, prompt(30))
        with pytest.raises(EngineError, match="finalize"):
            decode(s.model, [cache], torch.tensor([5]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(budget=0), "budget"),
        (dict(budget=10), "budget"),
        (dict(budget=100.5), "budget"),
        (dict(hot=0.5), "hot"),
        (dict(rank=0), "rank"),
        (dict(dense_layers=-1), "dense_layers"),
        (dict(keys="lowrank", attend_on="host"), "attend_on"),
        (dict(top_p=1.5), "top_p"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        preset("headrace", **settings)


def test_an_option_that_an_index_does_not_have_is_named():
    with (
        Sparse(build("llama"), preset("headrace", options={"pages": 3})) as s,
        pytest.raises(ConfigError, match="pages"),
    ):
        generated(s.model, [s.cache()], [prompt(30)], 1)


def test_an_unknown_preset_or_setting_is_an_error_that_lists_what_there_is():
    with pytest.raises(ConfigError, match="shadowkv"):
        preset("shadow")
    with pytest.raises(ConfigError, match="budgets"):
        preset("headrace", budgets=3)
    assert not Method().sparse
