"""ROUGE-L: by hand, and beside the package that LongBench uses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.metrics.rouge import rouge_l


def f(shared, said, reference):
    precision, recall = shared / said, shared / reference
    return pytest.approx(2 * precision * recall / (precision + recall), abs=1e-7)


@pytest.mark.parametrize(
    ("said", "reference", "score"),
    [
        ("a b c d", "a c e", f(2, 4, 3)),
        ("c a", "a c", f(1, 2, 2)),  # in order
        ("w1 w2 w6. w1 w3 w9 w5", "w1 w2 w3 w4 w5", f(4, 6, 5)),  # of all sentences together
        ("a a a", "a", f(1, 1, 1)),  # different words
        ("a b", "A b", f(1, 2, 2)),
        ("a. b", "b. a", f(2, 2, 2)),  # sentences may change places
        ("3.14", "3 14", f(2, 2, 2)),  # a point ends a sentence
        (" ", "a. ", f(1, 1, 2)),  # a sentence of blanks has one word, the empty one
    ],
)
def test_the_f_of_a_summary(said, reference, score):
    assert rouge_l(said, reference) == score


@pytest.mark.parametrize(("said", "reference"), [("", "a"), ("a", ""), ("...", "a"), ("a", "b")])
def test_nothing_in_common_is_0(said, reference):
    assert rouge_l(said, reference) == 0


def test_the_reference_against_itself_is_just_below_1():
    assert rouge_l("a b. c", "a b. c") == 2 * (1 / (2 + 1e-8))


def test_long_sentences_are_scored_where_the_package_runs_out_of_stack():
    words = " ".join(str(i) for i in range(900))
    assert rouge_l(words, words) == pytest.approx(1)


WORDS = st.sampled_from(["a", "b", "c", "d", "a.", "b .", ".", "\n", "  "])
TEXTS = st.lists(WORDS, max_size=25).map(" ".join)


@given(TEXTS, TEXTS)
@settings(max_examples=300)
def test_it_is_the_number_of_the_package_to_the_last_bit(said, reference):
    package = pytest.importorskip("rouge", reason="the package rouge 1.0.1 is not installed")
    try:
        expected = package.Rouge().get_scores([said], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:  # LongBench's rule
        expected = 0.0
    assert rouge_l(said, reference) == expected
