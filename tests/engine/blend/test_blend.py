"""A blend where it takes no shortcut, and what it must never do where it does."""

from dataclasses import dataclass

import pytest
import torch

from engine import Engine, ModelError, Segments
from engine.blend.blend import blend
from engine.blend.policies import Budget, _Once
from engine.blend.reuse import plan
from engine.cache import SequenceCache
from engine.loading import Loader
from engine.staging import Placed
from tests.engine import oracle
from tests.engine.blend.requests import CONFIG, POLICIES, blended, full, segments
from tests.engine.families import build, every_family, prompt

CLOSE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def module():
    return build("llama")


@pytest.fixture(scope="module")
def engine(module):
    with Engine(module, config=CONFIG) as engine:
        yield engine


def assert_same_kv(got, want, tokens=slice(None), layers=slice(None)):
    for (k, v), (wk, wv) in zip(got.layers[layers], want.layers[layers], strict=True):
        torch.testing.assert_close(k[:, tokens], wk[:, tokens], **CLOSE)
        torch.testing.assert_close(v[:, tokens], wv[:, tokens], **CLOSE)


@every_family
def test_at_ratio_one_every_policy_is_a_full_prefill(family):
    module, asked = build(family), segments(3, separator=[7, 8])
    with Engine(module, config=CONFIG) as engine:
        want = oracle.logits(module, asked.tokens)[-1]
        exact = full(engine, asked)
        for policy in POLICIES:
            got = blended(engine, asked, policy=policy, share=1.0)
            torch.testing.assert_close(got.logits, want, **CLOSE)
            assert_same_kv(got, exact)
            assert got.report.charged == 1


@every_family
def test_reused_keys_of_layer_0_are_those_of_the_target_position(family):
    with Engine(build(family), config=CONFIG) as engine:
        asked = segments(4).ordered([2, 0, 3, 1])
        got, want = blended(engine, asked, policy="reposition"), full(engine, asked)
        assert got.report.charged == 0
        assert got.report.reused_tokens == sum(len(c) for c in asked.chunks[1:])
        for mine, theirs in zip(got.layers[0], want.layers[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@every_family
def test_a_chunk_at_its_original_place_is_a_full_prefill(family):
    module = build(family)
    with Engine(module, config=CONFIG) as engine:
        asked = segments(1)
        got = blended(engine, asked, policy="reposition")
        torch.testing.assert_close(got.logits, oracle.logits(module, asked.tokens)[-1], **CLOSE)
        assert_same_kv(got, full(engine, asked))
        assert got.report.exact_tokens == len(asked.chunks[0])


def test_without_a_prefix_the_first_chunk_is_in_its_place(engine, module):
    asked = Segments((), segments().chunks[:1], [5, 6])
    got = blended(engine, asked, policy="reposition")
    torch.testing.assert_close(got.logits, oracle.logits(module, asked.tokens)[-1], **CLOSE)


def test_reposition_is_not_a_full_prefill(engine):
    asked = segments()
    apart = blended(engine, asked, policy="reposition").logits - full(engine, asked).logits
    assert apart.abs().max() > 0.1  # else the tests here would prove little


def test_every_order_of_chunks_at_ratio_one_is_a_prefill_in_that_order(engine, module):
    for order in ([3, 2, 1, 0], [1, 3, 0, 2], [0, 0, 2, 2]):
        asked = segments().ordered(order)
        got = blended(engine, asked, share=1.0).logits
        torch.testing.assert_close(got, oracle.logits(module, asked.tokens)[-1], **CLOSE)


def test_the_tokens_of_the_question_are_all_fresh(engine):
    """Even where the question is a stored chunk; separators and the prefix are fresh, too."""
    asked = segments()
    question = asked.chunks[2]
    asked = Segments(asked.prefix, asked.chunks[:1], question, [7, 8, 9])
    engine.precompute([question], asked.prefix)
    got, want = blended(engine, asked, policy="reposition"), full(engine, asked)
    assert_same_kv(got, want)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    assert got.report.fresh_tokens == len(asked.prefix) + 3 + len(question)


@dataclass(frozen=True)
class Some(_Once):
    """Blocks by their numbers."""

    chosen: tuple[int, ...]

    def first(self, reuse, budget, relevance):
        blocks = ~reuse.everything
        blocks[list(self.chosen)] = True
        return blocks


def forced(engine, asked, policy):
    """A blend of a stored prompt by a policy of the test's own."""
    prefix = asked.prefix
    engine.precompute(asked.chunks, prefix)
    model, size = engine.model, CONFIG.block_tokens
    placed = [
        Placed(key, start + i * size)
        for chunk, (start, _) in zip(asked.chunks, asked.spans)
        for i, key in enumerate(engine.blending.chunks.keys(prefix, chunk))
    ]
    cache = SequenceCache(model.shape, len(asked.tokens))
    reuse = plan(asked, 0, model.shape.device)
    loader = Loader(model, cache, engine.store, placed, len(asked.tokens), {})
    budget = Budget(0.5, reuse, model.shape.num_layers)
    tokens = torch.tensor(asked.tokens)
    logits = blend(model, cache, tokens, reuse, loader, policy, budget)
    return logits, [cache.view(i, cache.length) for i in range(model.shape.num_layers)], reuse


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "glm4"])
def test_a_changed_token_changes_nothing_before_it(family):
    """The causal mask of scattered tokens: nobody sees the future."""
    asked, policy = segments(), Some((1, 4, 5, 9))
    with Engine(build(family), config=CONFIG) as engine:
        _, before, _ = forced(engine, asked, policy)
        for part, at in (("question", -1), ("question", 0), ("chunk", 3), ("chunk", 2)):
            chunks, question = [list(c) for c in asked.chunks], list(asked.question)
            if part == "chunk":
                chunks[at][0] += 1
                position = asked.spans[at].start
            else:
                question[at] += 1
                position = len(asked.context) + at % len(question)
            changed = Segments(asked.prefix, chunks, question)
            _, after, _ = forced(engine, changed, policy)
            for (k, v), (k2, v2) in zip(before, after, strict=True):
                torch.testing.assert_close(k2[:, :position], k[:, :position], rtol=0, atol=1e-6)
                torch.testing.assert_close(v2[:, :position], v[:, :position], rtol=0, atol=1e-6)
            last = slice(position, position + 1)
            assert (after[-1].v[:, last] - before[-1].v[:, last]).abs().max() > 1e-3


def test_a_repaired_block_attends_to_all_of_its_past_and_others_stay_as_stored(engine):
    """One block in the last chunk is as if everything before it had been prefilled like that."""
    asked = segments()
    _, layers, reuse = forced(engine, asked, Some((9,)))
    stored = blended(engine, asked, policy="reposition")
    exact = full(engine, asked)
    mine = (reuse.owner == 9).nonzero()[:, 0]
    others = ((reuse.owner != 9) & (reuse.owner != -1)).nonzero()[:, 0]
    for i, (k, v) in enumerate(layers):
        torch.testing.assert_close(k[:, others], stored.layers[i].k[:, others])
        torch.testing.assert_close(v[:, others], stored.layers[i].v[:, others])
        if i == 1:  # made of layer 0, whose stored KV is exact in any place
            torch.testing.assert_close(v[:, mine], exact.layers[1].v[:, mine], **CLOSE)
            assert (stored.layers[1].v - exact.layers[1].v)[:, mine].abs().max() > 1e-3


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_more_repair_brings_the_kv_nearer_to_a_full_prefill(engine, policy):
    asked = segments()
    want = torch.stack([v for _, v in full(engine, asked).layers])

    def off(share):
        got = blended(engine, asked, policy=policy, share=share)
        return float((torch.stack([v for _, v in got.layers]) - want).square().mean())

    assert off(0.1) > off(0.7) > off(0.97) > off(1.0)


def test_the_share_that_is_charged_is_the_one_asked_for(engine):
    asked = segments(7)
    for policy in ("boundary", "query", "union"):
        for share in (0.25, 0.5, 0.8):
            report = blended(engine, asked, policy=policy, share=share).report
            block = 16 / report.reused_tokens
            assert share - block < report.charged <= share, policy
    assert blended(engine, asked, policy="reposition", share=0.5).report.charged == 0
    charged = blended(engine, asked, policy="deviation", share=0.9).report.charged
    assert 0.85 < charged <= 0.9
    least = blended(engine, asked, policy="deviation", share=0.1).report.charged
    assert least == pytest.approx(2 / 3)  # the check layer and the one before it, of three


@pytest.mark.parametrize(("prefix", "question"), [(9, 4), (9, 100), (200, 20)])
@pytest.mark.parametrize("policy", ["boundary", "query", "union"])
def test_a_long_question_or_prefix_does_not_use_up_the_repair(engine, policy, prefix, question):
    """A probe reads all that has no KV: it costs more than there is, where that is much."""
    made = segments(7)
    asked = Segments(prompt(prefix, seed=8).tolist(), made.chunks, prompt(question).tolist())
    for share in (0.0, 0.1, 0.3):
        report = blended(engine, asked, policy=policy, share=share).report
        block = 16 / report.reused_tokens
        assert share - block < report.charged <= share, share
        assert (report.policy == policy) == ("instead of" not in report.reason)


@pytest.mark.parametrize("policy", ["query", "union"])
def test_a_policy_whose_probe_costs_too_much_is_not_the_one_reported(engine, policy):
    made = segments(7)
    asked = Segments(made.prefix, made.chunks, prompt(100).tolist())
    report = blended(engine, asked, policy=policy, share=0.1).report
    assert report.policy == "boundary"
    assert f"boundaries instead of {policy}: its probe of " in report.reason
    report = blended(engine, made, policy=policy, share=0.5).report
    assert (report.policy, report.reason) == (policy, "load: as configured")
    report = blended(engine, asked, policy=policy, share=1.0).report
    assert report.policy == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_where_nothing_is_to_repair_nothing_is_charged(engine, policy):
    made = segments()
    asked = Segments(made.prefix, made.chunks[:1], made.question)
    got = blended(engine, asked, policy=policy, share=0.5)
    assert (got.report.reused_tokens, got.report.charged) == (0, 0)
    assert got.report.policy == policy
    assert got.report.reason == "load: all that is stored is in its place"
    torch.testing.assert_close(got.logits, full(engine, asked).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_frequencies_change_is_refused_and_keeps_exact_prefixes(kind):
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
    if kind == "longrope":
        rope = dict(
            rope_type="longrope",
            rope_theta=10000.0,
            short_factor=[1.0] * 32,
            long_factor=[2.0] * 32,
            original_max_position_embeddings=256,
            factor=4.0,
        )
    module = build("llama", rope_parameters=rope, max_position_embeddings=256)
    asked = segments(2)
    with Engine(module, config=CONFIG) as engine:
        for attempt in (lambda: engine.generate(asked), lambda: engine.precompute(asked.chunks)):
            with pytest.raises(ModelError, match="one list of tokens"):
                attempt()
        for cached in (0, len(asked.tokens) // 16 * 16):
            done = engine.generate([list(asked.tokens)], max_new_tokens=1)[0]
            assert done.stats.cached_tokens == cached


def test_prompt_tokens_outside_of_chunks_are_no_chunk():
    asked = segments(2, separator=[7, 8])
    flat = list(asked.tokens)
    for (start, stop), chunk in zip(asked.spans, asked.chunks):
        assert tuple(flat[start:stop]) == chunk
        assert flat[stop : stop + 2] == [7, 8]
    assert asked.context + asked.question == asked.tokens
    assert asked.tokens[: len(asked.prefix)] == asked.prefix
    assert prompt(13, seed=51).tolist() == list(asked.question)
