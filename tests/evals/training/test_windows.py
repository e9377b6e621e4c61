"""Windows: of their length, with every answer's fact before it, and no held-out text."""

from dataclasses import replace

import numpy as np
import pytest

from evals.training.tasks import TASKS
from evals.training.windows import ANSWER, IGNORED, Mix, Windows

SEEDS = range(6)
PLAIN = {"copies": 0.0, "noise": 0.0, "lines": 0.0, "gaps": 0.0}


def draw(windows, task, seed, tokens=384, **settings):
    mix = Mix({task: 1.0}, **{**PLAIN, **settings})
    return windows.draw(mix, tokens, np.random.default_rng(seed))


def runs(window):
    """Where answers are: first place and length."""
    places = np.flatnonzero(window.kinds == ANSWER)
    return [run for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(run)]


@pytest.mark.parametrize("style", [{}, {"lines": 1.0}, {"noise": 1.0}, {"copies": 1.0}])
@pytest.mark.parametrize("tokens", [128, 384])
def test_a_window_has_exactly_its_tokens(windows, style, tokens):
    window = draw(windows, "single", 1, tokens, **style)
    assert [len(part) for part in window] == [tokens] * 5


@pytest.mark.parametrize("seed", SEEDS)
def test_little_of_a_window_is_padding(windows, tokenizer, seed):
    window = draw(windows, "single", seed)
    assert (window.ids == tokenizer.pad_token_id).mean() < 0.08


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", ["single", "plain", "two_hops", "multi_value"])
def test_a_whole_answer_was_stated_before_it_is_asked_for(windows, tokenizer, task, seed):
    window = draw(windows, task, seed)
    asked_from = int(np.flatnonzero(window.asking)[0])
    stated = tokenizer.decode(window.ids[:asked_from])
    for run in runs(window):
        answer = tokenizer.decode(window.ids[run]).split("<|eos|>")[0].strip(" .")
        assert run[0] > asked_from
        assert all(value in stated for value in answer.split(", "))


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_learned_from_the_values_in_statements(windows, tokenizer, seed):
    window = draw(windows, "plain", seed)
    context = ~window.asking
    numbers = [i for i in np.flatnonzero(context) if tokenizer.decode([window.ids[i]]).isdigit()]
    facts = tokenizer.decode(window.ids[context]).count("The special magic number for")
    assert sum(window.kinds[i] == IGNORED for i in numbers) >= 2 * facts > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_only_first_statements_of_two_hops_are_veiled(windows, tokenizer, seed):
    window = draw(windows, "two_hops", seed, density=0.4)
    veiled = tokenizer.decode(window.ids[window.veiled])
    assert "the same as" not in veiled
    assert not (window.veiled & window.asking).any()
    assert not draw(windows, "single", seed).veiled.any()


def test_copies_are_to_be_known_the_second_time(windows):
    window = draw(windows, "single", 3, copies=1.0)
    first = int(np.flatnonzero(window.kinds == ANSWER)[0])
    length = first - 1
    assert np.array_equal(window.ids[first:], window.ids[first - length : -length])


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_have_gaps_between_pieces_and_stay_in_reach(windows, seed):
    positions = draw(windows, "single", seed, gaps=1.0, reach=4096).positions
    steps = np.diff(positions)
    assert positions[0] == 0
    assert steps.min() >= 1
    assert positions[-1] < 4096
    assert (steps > 1).sum() <= 8


def test_without_gaps_positions_count(windows):
    assert np.array_equal(draw(windows, "single", 0).positions, np.arange(384))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_window(windows, task):
    one, other = draw(windows, task, 5), draw(windows, task, 5)
    assert all(np.array_equal(a, b) for a, b in zip(one, other))


def test_no_sentence_is_held_out(corpus, tokenizer):
    marked = replace(corpus, held_out=(("HELD OUT. ",),) * len(corpus.held_out))
    source = Windows(marked, tokenizer)
    texts = [tokenizer.decode(draw(source, "plain", seed).ids) for seed in range(20)]
    assert not any("HELD OUT" in text for text in texts)


@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_facts_of_one_task_may_be_alone_in_a_window(windows, tokenizer, alone):
    mix = Mix({"plain": 1.0, "single_uuid": 1.0}, alone=alone, **PLAIN)
    kinds = set()
    for seed in range(12):
        text = tokenizer.decode(windows.draw(mix, 1024, np.random.default_rng(seed)).ids)
        kinds.add(("The special magic number for" in text, "uuids" in text))
    mixed = (True, True) in kinds
    assert mixed == (not alone)
    assert alone == 0.0 or kinds == {(True, False), (False, True)}
