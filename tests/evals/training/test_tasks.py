"""Facts and questions: what is asked was stated, in the words that RULER uses."""

import re
from itertools import pairwise

import numpy as np
import pytest

from evals.ruler.templates import NEEDLE, NIAH, singular
from evals.training.keys import Names
from evals.training.tasks import TASKS

SEEDS = range(20)


def draw(corpus, task, seed):
    rng = np.random.default_rng(seed)
    return TASKS[task](Names(corpus.words, corpus.words[:50], rng), rng)


def values(answer):
    return re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}|\b\d{5,7}\b", answer)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", [name for name in TASKS if name != "tracing"])
def test_every_value_of_an_answer_is_stated(corpus, task, seed):
    facts = draw(corpus, task, seed)
    stated = " ".join(statement.text for statement in facts.statements)
    for question in facts.questions:
        assert values(question.answer)
        assert all(value in stated for value in values(question.answer))
        asked = question.text + question.prefix
        assert not any(value in asked for value in values(question.answer))


@pytest.mark.parametrize("seed", SEEDS)
def test_values_of_one_key_are_listed_in_the_order_of_the_text(corpus, seed):
    facts = draw(corpus, "multi_value", seed)
    stated = [values(statement.text)[0] for statement in facts.statements]
    assert values(facts.questions[0].answer) == stated


@pytest.mark.parametrize("seed", SEEDS)
def test_other_values_are_those_that_were_not_said_in_the_order_of_the_text(corpus, seed):
    facts = draw(corpus, "other_values", seed)
    stated = [values(statement.text)[0] for statement in facts.statements]
    said, left = (values(part) for part in (facts.questions[0].prefix, facts.questions[0].answer))
    assert said
    assert set(said) < set(stated)
    assert left == [value for value in stated if value not in said]
    assert facts.questions[0].prefix.endswith(",")


@pytest.mark.parametrize("seed", SEEDS)
def test_several_keys_are_answered_in_the_order_of_the_question(corpus, seed):
    facts = draw(corpus, "multi_query", seed)
    by_key = {
        s.text.split(" for ")[1].split(" is:")[0]: values(s.text)[0] for s in facts.statements
    }
    question = facts.questions[0]
    asked = re.split(", and |, ", question.text.split(" for ")[1].split(" mentioned in")[0])
    assert question.answer == " " + ", ".join(f"{key}: {by_key[key]}" for key in asked)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_second_hop_is_stated_without_the_value(corpus, seed):
    facts = draw(corpus, "two_hops", seed)
    first, second = facts.statements
    key = first.text.split(" is ")[0]
    assert second.text.endswith(f" is the same as {key}.")
    assert not values(second.text)
    assert first.veiled == (len(facts.questions) == 1)
    assert not second.veiled


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_is_followed_from_its_value_on(corpus, seed):
    facts = draw(corpus, "tracing", seed)
    chain = facts.questions[0].answer.split(" ")
    lines = [statement.text for statement in facts.statements]
    value = lines[0].split(" = ")[1]
    assert lines[0] == f"VAR {chain[0]} = {value}"
    assert lines[1:] == [f"VAR {b} = VAR {a} " for a, b in pairwise(chain)]
    assert f"{len(chain)} variables are assigned the value {value}" in facts.questions[0].prefix


def test_one_value_is_asked_for_in_rulers_singular(corpus):
    facts = draw(corpus, "single", 1)
    key, value = facts.statements[0].text[:-1].split(" for ")[1].split(" is: ")
    about = {"type_needle_v": "number", "query": key}
    assert facts.statements[0].text == NEEDLE.format(type_needle_v="numbers", key=key, value=value)
    assert facts.questions[0].text == singular(NIAH).question.format(**about)
    assert facts.questions[0].prefix == singular(NIAH).prefix.format(**about)
    assert facts.intro == singular(NIAH).context.format(context="", **about).strip()


def test_no_name_comes_twice():
    names = Names(("a", "b", "c"), ("d", "e"), np.random.default_rng(0))
    drawn = [names.single() for _ in range(50)] + [names.pair() for _ in range(50)]
    assert len(set(drawn)) == 100


def test_numbers_have_their_digits():
    names = Names((), (), np.random.default_rng(0))
    assert all(len(names.number(7)) == 7 for _ in range(200))
