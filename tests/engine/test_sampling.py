import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from engine.errors import PromptError
from engine.sampling import Sampling, _nucleus, sample


def draw(logits, sampling, count):
    generator = sampling.generator()
    return [sample(logits, sampling, generator) for _ in range(count)]


def test_greedy_takes_the_best_and_a_seed_repeats():
    logits = torch.randn(50)
    assert draw(logits, Sampling(), 3) == [int(logits.argmax())] * 3
    seeded = Sampling(temperature=1.0, seed=5)
    assert draw(logits, seeded, 20) == draw(logits, seeded, 20)
    assert draw(logits, seeded, 20) != draw(logits, Sampling(temperature=1.0, seed=6), 20)


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 5, 40, 99]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_what_can_be_drawn_is_what_transformers_would_draw_from(seed, temperature, top_k, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    allowed = torch.isfinite(warpers(None, logits[None])[0]).nonzero()[:, 0].tolist()
    drawn = draw(logits, Sampling(temperature, top_k, top_p, seed), 200)
    assert set(drawn) <= set(allowed)


def test_a_temperature_next_to_nothing_is_greedy():
    logits = torch.randn(30)
    assert draw(logits, Sampling(temperature=1e-45, seed=1), 5) == [int(logits.argmax())] * 5


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = torch.tensor(draw(logits, Sampling(temperature=2.0, seed=1), 20_000))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, (logits / 2).softmax(-1), rtol=0, atol=0.015)


def test_the_nucleus_keeps_the_best_token_whatever_top_p_is():
    kept = _nucleus(torch.tensor([0.6, 0.3, 0.1]), 0.01)
    assert kept.tolist() == pytest.approx([0.6, 0, 0])


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(PromptError, match=next(iter(bad))):
        Sampling(**bad)
