"""Shared context: what stands in the text, what comes before a question, what is asked last."""

import pytest

from evals.multiturn import EARLY, QUESTIONS, MultiTurnSuite
from evals.prompt import ask
from tests.evals.tokenizers import TOKENIZERS, tiny

TASKS = MultiTurnSuite().tasks


def sample_of(task, length=4096, tokenizer=None):
    return next(iter(MultiTurnSuite().samples(tokenizer or tiny(), task, length, 1)))


@pytest.mark.parametrize("task", TASKS)
def test_each_turn_asks_for_a_needle_of_its_own(task):
    sample = sample_of(task)
    values = [turn.outputs for turn in sample.turns]
    assert len(set(values)) == len({turn.prefix for turn in sample.turns}) == QUESTIONS
    assert all(sample.context.count(value) == 1 for (value,) in values)
    for turn in sample.turns:
        statement = f"{turn.prefix.split(' for ')[1].split()[0]} is"
        at = sample.context.index(turn.outputs[0])
        assert statement in sample.context[at - 40 : at]


@pytest.mark.parametrize("task", TASKS)
def test_evidence_lies_in_each_part_and_the_last_question_is_about_the_earliest(task):
    sample = sample_of(task)
    depths = sample.extra["depths"]
    assert sorted(int(x * QUESTIONS) for x in depths) == list(range(QUESTIONS))
    assert depths[-1] == min(depths) <= EARLY
    places = [sample.context.index(turn.outputs[0]) for turn in sample.turns]
    assert sorted(range(QUESTIONS), key=places.__getitem__) == sorted(
        range(QUESTIONS), key=depths.__getitem__
    )


@pytest.mark.parametrize("wording", ["plain", "ruler"])
def test_requests_stand_alone(wording):
    sample = sample_of(f"multi-request-{wording}")
    assert sample.family == "multi-request"
    for turn in sample.turns:
        assert turn.question.count("What is") == 1
        assert not any(other.outputs[0] in turn.question for other in sample.turns)


@pytest.mark.parametrize(("wording", "between"), [("plain", ""), ("ruler", "\n")])
def test_turns_carry_the_earlier_questions_and_their_references(wording, between):
    sample, before = sample_of(f"multi-turn-{wording}"), ""
    alone = sample_of(f"multi-request-{wording}")
    assert sample.family == "multi-turn"
    for turn, single in zip(sample.turns, alone.turns):
        assert turn.question == before + single.question
        assert turn.outputs == single.outputs
        assert turn.outputs[0] not in turn.question
        before = f"{turn.question}{turn.prefix} {turn.outputs[0]}.{between}"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_all_turns_share_the_whole_text(task, tokenizer):
    tokenizer = TOKENIZERS[tokenizer]()
    sample = sample_of(task, 6144, tokenizer)
    asked = ask(tokenizer, sample)
    assert len({x.context for x in asked}) == 1
    assert all(
        value in tokenizer.decode(asked[0].context)
        for (value,) in (t.outputs for t in sample.turns)
    )


def test_a_turns_score_is_about_its_own_value():
    suite, sample = MultiTurnSuite(), sample_of("multi-turn-plain")
    first, second = (turn.outputs[0] for turn in sample.turns[:2])
    assert suite.score(sample, 1, f" {second}") == 100
    assert suite.score(sample, 1, f" {first}") == 0
