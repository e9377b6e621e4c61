"""The bound on what a selection misses holds as often as it says, on flat and heavy tails."""

import math

import pytest
import torch

from retrieval.estimate import certificate, draw
from tests.retrieval.keys import others, selected_ids


def test_it_draws_what_is_not_selected_and_all_of_it_alike():
    for length, count in ((40, 25), (40, 1), (40, 39), (7, 0), (300, 299)):
        ids = selected_ids(2, count, length)
        drawn = draw(ids, length, 20_000, torch.Generator().manual_seed(0))
        for own, head in zip(drawn, others(ids, length)):
            times = torch.bincount(own, minlength=length)
            assert set(times.nonzero()[:, 0].tolist()) == set(head.tolist())
            expected = 20_000 / len(head)
            assert (times[head] - expected).abs().max() < 6 * math.sqrt(expected)


def test_there_is_nothing_to_draw_if_all_is_selected():
    assert draw(torch.arange(9).expand(3, -1), 9, 5).shape == (3, 0)


def heads():
    """Logits of 4096 tokens: flat, ordinary and heavy tails, and a few hot tokens among cold."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4096, generator=generator)
    hot = noise.clone()
    hot[torch.randperm(4096, generator=generator)[:100]] += 7
    student = torch.randn(3, 4096, generator=generator).square().mean(0).sqrt()
    return {
        "flat": 0.3 * noise,
        "ordinary": noise,
        "heavy": 3 * noise,
        "student": noise / student,
        "hot": hot,
    }


def split(logits, budget=82):
    """The largest are selected; what is left, and the share of the exponentials it has."""
    ordered = logits.sort(descending=True).values
    best, rest = ordered[:budget], ordered[budget:]
    share = rest.exp().sum() / ordered.exp().sum()
    return best.logsumexp(0), rest, float(share), rest.max()


def certified(name, trials, sample, **settings):
    """Independent trials on one head, as so many query heads."""
    selected, rest, share, ceiling = split(heads()[name])
    generator = torch.Generator().manual_seed(7)
    drawn = rest[torch.randint(len(rest), (trials, sample), generator=generator)]
    many = (selected.expand(trials), ceiling.expand(trials))
    return certificate(drawn, len(rest), *many, **settings), share, rest, selected


@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize("sample", [41, 82, 400])
@pytest.mark.parametrize("name", heads())
def test_the_bound_holds_as_often_as_it_says(name, sample, delta):
    found, share, _, _ = certified(name, 2000, sample, delta=delta)
    assert (found.upper < share).float().mean() <= delta
    assert (found.upper >= found.missed).all()
    assert (found.upper <= 1).all()


@pytest.mark.parametrize("eps", [0.05, 0.1])
@pytest.mark.parametrize("name", heads())
def test_a_sample_of_the_size_it_asks_for_is_as_exact_as_it_says(name, eps):
    delta, trials = 0.1, 400
    found, _, rest, selected = certified(name, trials, 82, eps=eps, delta=delta)
    kept, missing = selected.double().exp(), rest.double().exp().sum()
    generator = torch.Generator().manual_seed(11)
    wrong = 0
    for size in found.needed.tolist():
        assert 1 <= size <= len(rest)
        if size == len(rest):
            continue  # all of them can be read then
        drawn = rest[torch.randint(len(rest), (size,), generator=generator)]
        estimate = drawn.double().exp().mean() * len(rest)
        wrong += bool((estimate - missing).abs() > eps * (kept + missing))
    assert wrong / trials <= delta


@pytest.mark.parametrize("name", heads())
def test_the_estimate_of_the_sum_is_unbiased(name):
    found, _, rest, _ = certified(name, 20_000, 64)
    sums, want = found.lse.double().exp(), rest.double().exp().sum()
    assert (sums.mean() - want).abs() < 4 * sums.std() / math.sqrt(20_000)


def test_it_escalates_where_attention_is_left_out_and_not_where_a_needle_has_it():
    flat, share, _, _ = certified("flat", 100, 82)
    assert share > 0.9
    assert flat.escalate.all()
    needle = torch.cat([torch.tensor([15.0]), torch.randn(4095)])
    selected, rest, share, ceiling = split(needle)
    sample = rest[draw(torch.arange(0)[None], len(rest), 82)]
    found = certificate(sample, len(rest), selected[None], ceiling[None])
    assert share < 0.01
    assert not found.escalate.any()


def test_a_larger_sample_makes_the_bound_tighter():
    bounds = [certified("ordinary", 50, m)[0].upper.mean() for m in (20, 80, 320, 1280)]
    assert bounds == sorted(bounds, reverse=True)


def test_logits_of_any_size_do_not_overflow():
    logits, selected = torch.randn(2, 50), torch.tensor([4.0, 1.0])
    ceiling = torch.full((2,), 4.0)
    want = certificate(logits, 1000, selected, ceiling)
    for shift in (-3000.0, 3000.0):
        got = certificate(logits + shift, 1000, selected + shift, ceiling + shift)
        torch.testing.assert_close(got.missed, want.missed, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(got.upper, want.upper, rtol=1e-3, atol=1e-5)


def test_nothing_is_missed_if_all_is_selected():
    selected = torch.zeros(3)
    found = certificate(torch.empty(3, 0), 0, selected, selected)
    assert found.lse.isneginf().all()
    assert not found.missed.any()
    assert not found.upper.any()
    assert not found.needed.any()
    assert not found.escalate.any()


@pytest.mark.parametrize(
    ("sample", "settings", "message"),
    [
        (1, {}, "needs a sample of two tokens or more, got 1"),
        (9, dict(eps=0.0), "need eps > 0 and 0 < delta < 1, got 0.0, 0.05"),
        (9, dict(delta=1.0), "need eps > 0 and 0 < delta < 1, got 0.05, 1.0"),
    ],
)
def test_what_does_not_make_a_certificate_is_named(sample, settings, message):
    with pytest.raises(ValueError, match=message):
        certificate(torch.zeros(2, sample), 10, torch.zeros(2), torch.zeros(2), **settings)
