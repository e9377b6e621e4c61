"""Drawn requests have the moments that were asked for."""

import numpy as np
import pytest

from engine.errors import ConfigError
from evals.traffic.arrival import Arrival
from evals.traffic.generate import Traffic, conversations, fit, generate, messages
from evals.traffic.spread import Spread, measured

COUNT = 100_000
TRAFFIC = Traffic(
    gap_s=Spread(0.2, 2.5, "gamma"),
    message=Spread(800.0, 1.2),
    answer=Spread(220.0, 0.8),
    turns=3.5,
    think_s=Spread(40.0, 0.7, "gamma"),
    failures=0.03,
)


def near(wanted):
    return pytest.approx(wanted, rel=0.05)


@pytest.fixture(scope="module")
def drawn():
    return generate(TRAFFIC, COUNT, seed=1)


@pytest.mark.parametrize("kind", ["gamma", "lognormal", "zipf"])
@pytest.mark.parametrize(("mean", "cv"), [(40.0, 0.6), (1000.0, 1.0), (3000.0, 1.7)])
def test_a_spread_has_its_mean_and_cv(kind, mean, cv):
    dice = np.random.default_rng(2)
    lengths = Spread(mean, cv, kind).lengths(dice, COUNT)
    assert min(lengths) >= 1
    found = measured(lengths)
    assert (found.mean, found.cv) == (near(mean), near(cv))


def test_no_variation_is_a_constant():
    dice = np.random.default_rng(3)
    for kind in ("gamma", "lognormal"):
        assert set(Spread(7.0, 0.0, kind).lengths(dice, 50)) == {7}


def test_what_a_zipf_law_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"0\.58 to .* not 0\.30"):
        Spread(1000.0, 0.3, "zipf").draw(np.random.default_rng(), 1)


@pytest.mark.parametrize(
    ("mean", "cv", "kind"),
    [
        (0.2, 1.0, "zipf"),
        (0.5, 0.6, "zipf"),
        (0.500001, 0.6, "zipf"),
        (1e300, 1.0, "zipf"),
        (1.0, 1e200, "gamma"),
        (1.0, 1e200, "lognormal"),
        (1e308, 30.0, "lognormal"),
        (1e308, 30.0, "gamma"),
    ],
)
def test_what_no_shape_can_have_is_refused(mean, cv, kind):
    with pytest.raises(ConfigError, match=r"out of the range|begins at 0\.5"):
        Spread(mean, cv, kind).draw(np.random.default_rng(3), 50)


@pytest.mark.parametrize(
    ("mean", "cv"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.1), (float("nan"), 1.0)]
)
def test_a_spread_needs_a_mean_and_a_cv(mean, cv):
    with pytest.raises(ConfigError, match="mean above 0"):
        Spread(mean, cv)


def test_arrivals_are_as_bursty_as_asked(drawn):
    times = np.array([x.at_s for x in drawn])
    gaps = measured(np.diff(times))
    assert times[0] == 0
    assert (gaps.mean, gaps.cv) == (near(0.2), near(2.5))


def test_lengths_are_as_asked(drawn):
    added, answers = measured(messages(drawn)), [x.new_tokens for x in drawn if not x.failed]
    assert (added.mean, added.cv) == (near(800), near(1.2))
    assert (measured(answers).mean, measured(answers).cv) == (near(220), near(0.8))


def test_without_conversations_prompts_are_as_asked():
    traffic = Traffic(gap_s=TRAFFIC.gap_s, message=TRAFFIC.message, answer=TRAFFIC.answer)
    found = generate(traffic, COUNT, seed=5)
    prompts = measured([x.prompt_tokens for x in found])
    assert (prompts.mean, prompts.cv) == (near(800), near(1.2))
    assert len({x.session for x in found}) == COUNT


def test_a_conversation_repeats_what_was_said(drawn):
    talks = conversations(drawn)
    assert len(drawn) / len(talks) == near(3.5)
    for talk in talks:
        history = 0
        for x in talk:
            assert x.prompt_tokens > history
            history = x.prompt_tokens + x.new_tokens


def test_a_turn_waits_until_its_user_has_thought(drawn):
    found = fit(drawn).think_s
    # and until a request comes that no other conversation waited longer for: bursts leave few
    assert 40 < found.mean < 43
    assert found.mean * found.cv == near(40 * 0.7)


def test_failures_have_no_answer(drawn):
    failed = [x for x in drawn if x.failed]
    assert len(failed) / COUNT == pytest.approx(0.03, rel=0.1)
    assert {x.new_tokens for x in failed} == {0}
    assert min(x.new_tokens for x in drawn if not x.failed) >= 1


def test_a_fit_finds_what_was_asked(drawn):
    found = fit(drawn)
    for name in ("gap_s", "message", "answer"):
        wanted, got = getattr(TRAFFIC, name), getattr(found, name)
        assert (got.mean, got.cv, got.kind) == (near(wanted.mean), near(wanted.cv), wanted.kind)
    assert found.turns == near(3.5)
    assert found.failures == pytest.approx(0.03, rel=0.1)


def test_a_seed_draws_the_same_and_another_draws_others():
    assert generate(TRAFFIC, 50, seed=7) == generate(TRAFFIC, 50, seed=7)
    assert generate(TRAFFIC, 50, seed=7) != generate(TRAFFIC, 50, seed=8)


def test_a_conversation_that_was_cut_begins_anew():
    cut = [Arrival(0.0, 100, 10, "a"), Arrival(1.0, 150, 10, "a"), Arrival(2.0, 60, 10, "a")]
    assert messages(cut) == [100, 40, 60]


@pytest.mark.parametrize("change", [{"turns": 0.5}, {"failures": 1.0}, {"failures": -0.1}])
def test_traffic_that_cannot_be_is_refused(change):
    with pytest.raises(ConfigError, match="turns"):
        Traffic(gap_s=Spread(1.0, 1.0), message=Spread(1.0, 1.0), answer=Spread(1.0, 1.0), **change)


def test_conversations_need_a_time_to_think():
    with pytest.raises(ConfigError, match="think_s"):
        Traffic(gap_s=TRAFFIC.gap_s, message=TRAFFIC.message, answer=TRAFFIC.answer, turns=2.0)


def test_too_few_requests_are_refused():
    with pytest.raises(ConfigError, match="1 request or more"):
        generate(TRAFFIC, 0)
    with pytest.raises(ConfigError, match="2 requests or more"):
        fit([Arrival(0.0, 1, 1)])
