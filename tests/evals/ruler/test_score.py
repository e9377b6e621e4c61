"""RULER's metric against cases worked out by hand."""

import pytest

from engine.errors import ConfigError
from evals.metrics import ruler_score
from evals.metrics.ruler import ALL, ANY


@pytest.mark.parametrize(
    ("task", "prediction", "outputs", "score"),
    [
        ("niah_single_1", " 1234567.", ["1234567"], 100),
        ("niah_single_1", " 123456.", ["1234567"], 0),
        ("niah_multivalue", "1111111, 2222222 and 3333333", ["1111111", "3333333", "9", "8"], 50),
        ("vt", "ABCDE FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 40),
        ("vt", "abcde", ["ABCDE"], 100),  # upper and lower case are alike
        ("cwe", "vegetables important candles", ["table", "ant", "can", *"0123456"], 30),
        ("fwe", "", ["a", "b", "c"], 0),
        ("qa_1", "It was in 1066, I think", ["1066", "the year 1066"], 100),
        ("qa_1", "unknown", ["1066", "the year 1066"], 0),
        ("qa_2", "YES", ["yes"], 100),
        ("niah_single_1", "12\n34567", ["1234567"], 0),
        ("niah_single_1", "12\t34567", ["1234567"], 0),  # replaced, not removed
        ("niah_single_1", "a\tb", ["a\nb"], 100),  # by a line end
        ("niah_single_1", "\x00 a \x1f", ["a"], 100),
        ("niah_single_1", "\x01a", ["\na"], 0),  # and stripped again
        ("niah_single_1", "a\x7fb", ["a\x7fb"], 100),  # 0x7f is none of them
    ],
)
def test_a_prediction_scores_what_the_definition_says(task, prediction, outputs, score):
    assert ruler_score(task, prediction, outputs) == pytest.approx(score)


def test_shares_are_not_rounded():
    assert ruler_score("fwe", "a b", ["a", "b", "c"]) == pytest.approx(200 / 3)


@pytest.mark.parametrize("task", ALL)
def test_all_outputs_count_alike(task):
    assert ruler_score(task, "one three", ["one", "two", "three", "four"]) == 50


@pytest.mark.parametrize("task", ANY)
def test_one_reference_is_enough_for_a_question(task):
    assert ruler_score(task, "one", ["two", "one"]) == 100


def test_unknown_tasks_and_missing_outputs_are_refused():
    with pytest.raises(ConfigError, match="RULER has no task niah"):
        ruler_score("niah", "x", ["x"])
    with pytest.raises(ConfigError, match="vt: there are no outputs"):
        ruler_score("vt", "x", [])
