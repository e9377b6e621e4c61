"""Extraction: every value has a place of its own, and each counts."""

from itertools import pairwise

import pytest

from evals.extraction import TASKS, ExtractionSuite
from tests.evals.tokenizers import tiny


def sample_of(task, length=4096):
    return next(iter(ExtractionSuite().samples(tiny(), task, length, 1)))


@pytest.mark.parametrize("task", ExtractionSuite().tasks)
def test_values_lie_singly_in_equal_parts_of_the_text(task):
    sample, count = sample_of(task), TASKS[task.rpartition("-")[0]]
    (turn,) = sample.turns
    assert len(set(turn.outputs)) == count
    places = [sample.context.index(value) for value in turn.outputs]
    assert places == sorted(places)
    assert [int(x * count) for x in sample.extra["depths"]] == list(range(count))
    for depth, place in zip(sample.extra["depths"], places):
        assert place / len(sample.context) == pytest.approx(depth, abs=0.1)
    assert sum(b - a > 100 for a, b in pairwise(places)) > 0.8 * (count - 1)
    assert all(sample.context.count(value) == 1 for value in turn.outputs)


@pytest.mark.parametrize("task", ["extract-8-ruler", "extract-8-plain"])
def test_all_values_belong_to_the_key_that_is_asked_for(task):
    sample = sample_of(task)
    (turn,) = sample.turns
    key = turn.prefix.split(" for ")[1].split()[0]
    assert sample.context.count(f"for {key} is") == len(turn.outputs)
    assert f"What are all the special magic numbers for {key}" in turn.question
    assert turn.prefix.endswith(" are")


def test_rulers_wording_says_that_there_are_several():
    assert sample_of("extract-8-ruler").context.startswith("Some special magic numbers are hidden")


def test_the_answer_has_room_for_all_values():
    for task in ("extract-16-plain", "extract-16-ruler"):
        (turn,) = sample_of(task).turns
        assert turn.max_new_tokens >= len(tiny()(f" {', '.join(turn.outputs)}.")["input_ids"])


def test_the_score_is_the_share_of_values_found():
    suite, sample = ExtractionSuite(), sample_of("extract-8-plain")
    values = sample.turns[0].outputs
    assert suite.score(sample, 0, ", ".join(values)) == 100
    assert suite.score(sample, 0, " and ".join(values[2:5])) == 37.5
    assert suite.score(sample, 0, "".join(values)) == 0
    assert suite.score(sample, 0, f"{values[3]}, {values[3]}") == 12.5
