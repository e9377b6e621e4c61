"""Budgets grow where a sample of what is left out does not rule out that much is missed."""

import pytest
import torch

from engine.attention import attend_scores
from engine.errors import ConfigError
from engine.method import preset
from engine.model.pieces import AttentionSpec
from engine.sparse.certified import SAMPLED, most_missed
from evals.fixtures import KINDS, Size, make_fixture
from retrieval.estimate import draw
from retrieval.scalar import ScalarIndex
from retrieval.select import Policy
from tests.engine.families import build, prompt
from tests.engine.sparse.test_layer import Sparse, agree, dense, generated

SPEC = AttentionSpec(scale=128**-0.5)
POLICY = Policy(82)


def judged(trace, n, tokens, generator):
    """The bound, and what the worst query head truly misses."""
    length, q = trace.asked[n], trace.rotated.queries[n]
    keys = trace.rotated.keys[:, :length].float()
    others = draw(tokens, length, SAMPLED, generator)
    heads = torch.arange(len(keys))[:, None]
    best = torch.arange(POLICY.sinks, tokens.shape[1] - POLICY.window)
    missing = length - tokens.shape[1]
    bound = most_missed(q, keys[heads, tokens], keys[heads, others], missing, SPEC, best)
    probs = attend_scores(q, keys, SPEC).softmax(-1)
    index = tokens[:, None].expand(-1, probs.shape[1], -1)
    return bound, float(1 - probs.gather(2, index).sum(-1).min())


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_the_default_index(kind):
    generator, wrong, asked = torch.Generator().manual_seed(0), 0, 0
    for seed in range(3):
        trace = make_fixture(kind, seed, Size(tokens=4096))
        index = ScalarIndex(1, 128, torch.bfloat16)
        index.append(trace.rotated.keys[:, : trace.prompt])
        index.finalize()
        done = trace.prompt
        for n, length in enumerate(trace.asked):
            index.append(trace.rotated.keys[:, done:length])
            done = length
            tokens = index.search(trace.rotated.queries[n], POLICY, SPEC.scale)
            bound, true = judged(trace, n, tokens, generator)
            wrong += bound < true
            asked += 1
    assert wrong <= 0.05 * asked + 1, (wrong, asked)


def test_the_bound_is_of_use():
    """Where evidence holds 0.9 of attention, half of it is not suspected to be elsewhere."""
    generator = torch.Generator().manual_seed(0)
    trace = make_fixture("clustered", 0, Size(tokens=4096))
    index = ScalarIndex(1, 128, torch.bfloat16)
    index.append(trace.rotated.keys)
    index.finalize()
    bounds = []
    for n in range(len(trace.asked)):
        tokens = index.search(trace.rotated.queries[n], POLICY, SPEC.scale)
        bounds.append(judged(trace, n, tokens, generator)[0])
    assert sorted(bounds)[len(bounds) // 2] < 0.5


@pytest.mark.parametrize("name", ["headrace", "shadowkv"])
@pytest.mark.parametrize("attend_on", ["host", "device"])
def test_spread_attention_gets_the_budget_it_needs(name, attend_on):
    if name == "shadowkv" and attend_on == "host":
        attend_on = "device"  # its keys are made there
    module, prompts = build("llama", initializer_range=0.03), [prompt(400)]  # flat attention
    want = dense(module, prompts, 8)
    errors, stats = {}, {}
    for certify in (None, 0.01):
        method = preset(name, budget=40, rank=10_000, certify=certify, attend_on=attend_on)
        with Sparse(module, method) as s:
            cache = s.cache()
            got = generated(s.model, [cache], prompts, 8, forced=want.argmax(-1))
            stats[certify] = cache.stats
        errors[certify] = float((got - want).abs().max())
    assert stats[None].escalated == 0
    assert stats[0.01].escalated > 0
    assert stats[0.01].selected > 2 * stats[None].selected
    assert stats[0.01].hits <= stats[0.01].selected
    assert errors[0.01] < 0.1 * errors[None]


def test_a_budget_that_is_enough_is_left_alone():
    module, prompts = build("llama"), [prompt(300)]
    want = dense(module, prompts, 5)
    with Sparse(module, preset("headrace", budget=100_000, certify=0.01)) as s:
        cache = s.cache()
        agree(generated(s.model, [cache], prompts, 5, forced=want.argmax(-1)), want)
        assert cache.stats.escalated == 0


def test_a_share_out_of_range_is_refused():
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match=r"method\.certify"):
            preset("headrace", certify=share)
