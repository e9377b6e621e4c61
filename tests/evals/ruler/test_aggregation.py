"""Common and frequent words: counts that make the answers the answers."""

import re
from collections import Counter
from random import Random

import pytest

from evals.ruler.common_words import CommonWords
from evals.ruler.frequent_words import LEAST, FrequentWords
from evals.ruler.words import load_words

LIST = re.compile(r"(\d+)\. (.+?)(?= \d+\. |$)")


def lists(context):
    """The numbered lists of the example, its solution, and the problem."""
    asked = "Question: What are the 10 most common words in the above list?"
    example, rest = context.split(f"\n{asked}")
    solution, problem = rest.split("\nBelow ")
    parts = (example.split("\n")[1], solution.split("are:")[1], problem.split("\n")[1])
    return [LIST.findall(part) for part in parts]


@pytest.mark.parametrize(
    ("length", "example", "problem"), [(4095, (20, 3, 1), (6, 1)), (4096, (40, 10, 3), (30, 3))]
)
def test_words_repeat_as_often_as_the_length_has_it(length, example, problem):
    made = CommonWords(length, load_words().every).draft(Random(0), 0, 50)
    shown, solved, asked = lists(made.context)
    different, common, rare = example
    counts = Counter(word for _, word in shown)
    assert Counter(counts.values()) == {common: 10, rare: different - 10}
    assert {word for _, word in solved} == {x for x, count in counts.items() if count == common}
    counts = Counter(word for _, word in asked)
    assert Counter(counts.values()) == {problem[0]: 10, problem[1]: 40}
    assert set(made.outputs) == {word for word, count in counts.items() if count == problem[0]}


def test_lists_are_numbered_from_one_without_a_gap():
    made = CommonWords(2048, load_words().every).draft(Random(1), 0, 100)
    for found in lists(made.context):
        assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    assert "in the list are:1. " in made.context  # RULER has no blank there


def test_a_long_list_has_other_words_too_and_a_short_one_only_the_first():
    words = [f"w{'abcdefghijklmnop'[i]}" for i in range(16)]
    recipe = CommonWords(2048, words * 2, ["extra"])
    assert recipe.most == 33
    assert "extra" not in recipe.draft(Random(0), 0, 32).context
    assert "extra" in recipe.draft(Random(0), 0, 33).context


def test_words_are_those_of_the_package_whose_version_is_told():
    words = load_words()
    assert re.fullmatch(r"wonderwords \d+\.\d+\.\d+", words.origin)
    assert len(words.every) > 8000
    assert set(words.nouns) | set(words.adjectives) < set(words.every)
    assert list(words.every) == sorted(words.every)


@pytest.mark.parametrize("size", [LEAST, 74, 150, 1000, 9999])
@pytest.mark.parametrize("different", [5, 40, 600])
def test_frequencies_fall_with_the_square_of_the_rank(size, different):
    made = FrequentWords(different).draft(Random(0), 0, size)
    text = made.context.split("coded words. ")[1].split()
    counts = Counter(text)
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == made.outputs
    for rank, word in enumerate(ranked[:4], 1):
        assert counts[word] == int(size / rank**2 / 1.6449340668482264)
    assert counts[ranked[3]] > counts[ranked[4]]
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
    assert len(ranked) <= different


def test_every_size_from_the_least_has_one_answer():
    for size in range(LEAST, 2000):
        fourth, fifth = (int(size / rank**2 / 1.6449340668482264) for rank in (4, 5))
        assert fourth > fifth


def test_the_vocabulary_grows_with_the_length():
    assert FrequentWords.make(4096, 50).different == 80
    assert FrequentWords.make(131072, 50).different == 2620
    assert FrequentWords.make(100, 50).different == 5
