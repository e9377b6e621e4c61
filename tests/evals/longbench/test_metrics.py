"""LongBench's metrics against cases worked out by hand, odd rules included."""

import sys
from unittest import mock

import pytest

from engine.errors import ConfigError
from evals.metrics import chinese, longbench_score, longbench_v2_score
from evals.metrics.longbench_v2 import chosen


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("The cat sat on a mat.", "cat mat", 2 / 3),  # cat sat on mat: p 1/2, r 1
        ("no no no", "no", 1 / 2),  # each as often as it occurs: p 1/3, r 1
        ("well-known", "wellknown", 1),  # punctuation is gone, no blank in its place
        ("An  A the\nPARIS", "paris", 1),
        ("theatre", "atre", 0),  # an article is a word
        ("Paris\nRome", "Paris", 2 / 3),  # no first line here
        ("", "Paris", 0),
        ("the", "a", 0),  # nothing in common, though both are nothing
    ],
)
def test_f1_of_words(said, answer, score):
    assert longbench_score("hotpotqa", said, [answer]) == pytest.approx(score)


@pytest.mark.parametrize("dataset", ["triviaqa", "trec", "samsum", "lsht"])
def test_few_shot_answers_end_with_their_first_line(dataset):
    def scored(said):
        return longbench_score(dataset, said, ["Date"], ["Date", "Other"])

    assert scored("\n\nDate\nOther") == pytest.approx(1)
    assert scored(" \nDate") == 0  # only line ends are stripped
    assert scored("x\nDate") == 0


def test_the_best_reference_counts():
    assert longbench_score("qasper", "two words", ["none", "words", "two words"]) == 1
    assert longbench_score("qasper", "two words", ["none", "two"]) == pytest.approx(2 / 3)
    assert longbench_score("qasper", "two words", []) == 0


@pytest.mark.parametrize(
    ("said", "answer", "classes", "score"),
    [
        ("It is Date", "Date", ["Date", "Other"], 1),
        ("Date or Other", "Date", ["Date", "Other"], 1 / 2),
        ("Other", "Date", ["Date", "Other"], 0),
        ("datte", "Date", ["Date", "Other"], 0),  # a near miss: the rule for it is never reached
        ("Other loc", "Other loc", ["loc", "Date", "Other loc"], 1),  # "loc" is a part of it
        # "loc" goes, and "location", now in its place, is stepped over
        ("Other location", "Other location", ["loc", "location", "Other location"], 1 / 2),
    ],
)
def test_classes_that_are_named(said, answer, classes, score):
    assert longbench_score("trec", said, [answer], classes) == score
    assert longbench_score("lsht", said, [answer], classes) == score


@pytest.mark.parametrize(
    ("dataset", "said", "answer", "score"),
    [
        ("passage_count", "5, 5 or 6", "5", 2 / 3),
        ("passage_count", "none", "5", 0),
        ("passage_count", "05", "5", 0),
        ("passage_retrieval_en", "Paragraph 12 or 3", "Paragraph 12", 1 / 2),
        ("passage_retrieval_en", "12", "Paragraph 12", 1),
        ("passage_retrieval_en", "Paragraph 1", "Paragraph 12", 0),
        ("passage_retrieval_zh", "段落7，7，8", "段落7", 2 / 3),
    ],
)
def test_numbers_are_right_by_their_share(dataset, said, answer, score):
    assert longbench_score(dataset, said, [answer]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("```python\n# one\n// two\nx = 1\ny = 2", "x = 1", 1),
        ("abcd", "bcde", 0.75),  # 2 * 3 / 8
        ("a", "ab", 0.67),  # whole percents
        ("    x", "x", 0.33),  # 2 * 1 / 6: an indent counts
        ("\n\nx", "x", 1),
        ("  \nx", "x", 0),  # a line of blanks is a line: 0 letters in common
        ("```", "", 1),
        ("", "x", 0),
        ("x", "", 0),
    ],
)
def test_the_next_line_of_code(said, answer, score):
    assert longbench_score("lcc", said, [answer]) == score
    assert longbench_score("repobench-p", said, [answer]) == score


def test_a_long_line_is_compared_as_difflib_does_it():
    """Letters that are many in 200 and more are no anchors: without that rule it is 0.99."""
    assert longbench_score("lcc", "x" + "a" * 199, ["y" + "a" * 200]) == 0


def test_summaries_are_scored_by_rouge_l():
    # a c in order: r 2/3, p 2/4
    assert longbench_score("gov_report", "a b c d", ["a c e"]) == pytest.approx(4 / 7)


def test_chinese_is_scored_by_words():
    # 我 来到 北京 清华大学 beside 我 在 清华大学: p 2/4, r 2/3
    pair = "我来到北京清华大学", ["我在清华大学"]
    for dataset in ("multifieldqa_zh", "dureader", "vcsum"):
        assert longbench_score(dataset, *pair) == pytest.approx(4 / 7)


def test_chinese_questions_are_scored_without_punctuation_and_case():
    assert longbench_score("multifieldqa_zh", "“北京”，ABC。", ["北京 abc"]) == 1
    assert longbench_score("multifieldqa_zh", "《北京", ["北京"]) == pytest.approx(2 / 3)
    assert longbench_score("multifieldqa_zh", "。，", ["北京"]) == 0


def test_chinese_without_jieba_is_one_line_that_says_what_to_install():
    chinese._cutter.cache_clear()
    with mock.patch.dict(sys.modules, {"jieba": None}):
        with pytest.raises(ConfigError, match=r"jieba: pip install 'headrace\[evals\]'"):
            longbench_score("dureader", "北京", ["北京"])
        assert longbench_score("hotpotqa", "Paris", ["Paris"]) == 1


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(ConfigError, match="no data set ruler; it has narrativeqa, qasper"):
        longbench_score("ruler", "x", ["x"])
    with pytest.raises(ConfigError, match="trec is scored among all_classes, and there are none"):
        longbench_score("trec", "x", ["x"])
    with pytest.raises(ConfigError, match="should be Paragraph NUMBER, and is 'twelve'"):
        longbench_score("passage_retrieval_en", "12", ["twelve"])


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is** (*C*)", "C"),
        ("The correct answer is D", "D"),
        ("The correct answer is Apple", "A"),
        ("The correct answer is B, no: The correct answer is (C)", "C"),
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_the_choice_in_an_answer_of_version_2(said, letter):
    assert chosen(said) == letter
    for answer in "ABCD":
        assert longbench_v2_score(said, answer) == (answer == letter)
