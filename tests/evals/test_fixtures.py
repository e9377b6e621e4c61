"""Planted evidence is where it should be and weighs what it should."""

import math

import pytest
import torch

from evals.fixtures import (
    CHUNK,
    FLAT_SPREAD,
    HELD,
    KINDS,
    LAST_COSINE,
    MEAN,
    SINKS,
    SPAN,
    STRETCH,
    Size,
    _spots,
    make_fixture,
)
from evals.recall import mass, truths
from tests.evals.make import SIZES

SMALL = Size(tokens=4000, queries=6)


def probs(trace):
    """Attention of every query over what it sees, padded with zeros: [N, Hq, T]."""
    found = torch.zeros(len(trace.asked), trace.rotated.queries.shape[1], trace.values.shape[1])
    for n, truth in enumerate(truths(trace, 0.05)):
        found[n, :, : trace.asked[n]] = truth.probs
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_and_seed_makes_a_fixture_of_that_shape(kind, size):
    trace = make_fixture(kind, 123, size)
    heads = size.kv_heads * size.group
    assert trace.rotated.keys.shape == (size.kv_heads, size.tokens, size.head_dim)
    assert trace.rotated.queries.shape == (size.queries, heads, size.head_dim)
    assert trace.asked[-1] == size.tokens
    for x in (*trace.rotated, trace.values):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixture_is_that_of_its_seed(kind):
    a, b, c = (make_fixture(kind, seed, SMALL).rotated.keys for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_kinds_of_one_seed_share_no_numbers():
    keys = {make_fixture(kind, 1, SMALL).rotated.keys.float().sum().item() for kind in KINDS}
    assert len(keys) == len(KINDS)


@pytest.mark.parametrize("kind", ["clustered", "scattered", "drift"])
@pytest.mark.parametrize("seed", range(3))
def test_evidence_carries_real_attention_and_is_few_tokens(kind, seed):
    size = Size(tokens=16384, queries=8)
    for truth in truths(make_fixture(kind, seed, size), 0.02):
        taken = float(mass(truth.probs, truth.tokens).mean())
        assert taken == pytest.approx(HELD, abs=0.08)


def test_clustered_evidence_lies_in_spans_and_scattered_has_one_token_a_chunk():
    generator = torch.Generator().manual_seed(0)
    spans = _spots(16384, False, generator).view(-1, SPAN)
    assert bool((spans.diff() == 1).all())
    spots = _spots(16384, True, generator)
    assert len(spots) == spans.numel() == 128
    chunks = (spots // CHUNK).unique()
    assert len(chunks) == len(spots)
    assert len((spots // STRETCH).unique()) == len(spots) * CHUNK // STRETCH


def test_the_tokens_of_most_attention_are_spread_as_the_kind_says():
    def neighbours(kind):
        found = probs(make_fixture(kind, 0))[:, 0].topk(128).indices.sort(-1).values
        return float((found.diff() == 1).float().mean())

    assert neighbours("clustered") > 0.5
    assert neighbours("scattered") < 0.05


def test_no_token_of_the_flat_fixture_matters():
    found = probs(make_fixture("flat", 0))
    wide = (-(found * found.log()).sum(-1)).exp() / found.shape[-1]
    assert float((wide - math.exp(-(FLAT_SPREAD**2) / 2)).abs().max()) < 0.05
    assert float(found.max()) < 20 / found.shape[-1]


def test_the_first_tokens_take_most_of_the_sink_fixtures_attention():
    held = probs(make_fixture("sink", 0))[..., :SINKS].sum(-1)
    assert float(held.mean()) == pytest.approx(HELD, abs=0.07)
    assert float(held.min()) > 0.3


def test_keys_have_a_large_common_mean_and_a_falling_spectrum():
    keys = make_fixture("flat", 5).rotated.keys[0].float()
    mean, noise = keys.mean(0), keys - keys.mean(0)
    length = noise.square().sum(-1).mean().sqrt()
    assert float(mean.norm() / length) == pytest.approx(MEAN, rel=0.05)
    energy = torch.linalg.svdvals(noise).square()
    assert 60 < int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) < 90


def test_the_means_of_keys_and_queries_turn_away_after_the_prompt_of_drift():
    trace = make_fixture("drift", 0, Size(queries=64))
    keys, prompt = trace.rotated.keys[0].float(), trace.prompt
    assert prompt == 8192
    assert trace.asked[0] > prompt
    ends = keys[:prompt].mean(0), keys[prompt : prompt + 300].mean(0), keys[-300:].mean(0)
    first, soon, last = (torch.nn.functional.normalize(x, dim=0) for x in ends)
    assert float(first @ soon) > 0.95
    assert float(first @ last) == pytest.approx(LAST_COSINE, abs=0.08)
    before = trace.rotated.past.flatten(0, 1).mean(0)
    turned = [x.flatten(0, 1).mean(0) for x in trace.rotated.queries.split(16)]
    cosines = [float(torch.nn.functional.cosine_similarity(before, x, dim=0)) for x in turned]
    assert cosines[0] > cosines[-1] + 0.1


def test_the_evidence_of_drift_is_older_than_its_question():
    trace = make_fixture("drift", 2, SMALL)
    assert list(trace.asked) == sorted(trace.asked)
    for truth, length in zip(truths(trace, 0.05), trace.asked):
        assert truth.probs.shape[1] == length
        assert float(mass(truth.probs, truth.tokens).mean()) > 0.7


@pytest.mark.parametrize(
    "changes",
    [dict(tokens=999), dict(kv_heads=0), dict(group=0), dict(queries=0), dict(head_dim=1)],
)
def test_a_size_that_holds_nothing_is_refused(changes):
    with pytest.raises(ValueError, match=r"1,000 tokens|head_dim"):
        Size(**changes)


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(Exception, match="drift"):
        make_fixture("steep", 0)
