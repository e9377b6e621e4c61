"""LongBench v2: four choices, and which one an answer names."""

import json

import pytest

from engine.errors import ConfigError
from evals.longbench import LongBenchV2Suite
from evals.prompt import prompt_tokens


def row(number, length="short", difficulty="easy", **other):
    return {
        "_id": str(number),
        "domain": "Long In-context Learning",
        "sub_domain": "User guide QA",
        "difficulty": difficulty,
        "length": length,
        "question": f" What is {number}? ",
        "choice_A": "one ",
        "choice_B": " two",
        "choice_C": "three",
        "choice_D": "four\n",
        "answer": "B",
        "context": f"\n\nText {number}. " * 50,
    } | other


ROWS = [row(0), row(1, "long", "hard"), row(2, "medium"), row(3, answer="D")]


def test_it_has_a_task_for_each_class_of_lengths(plain):
    suite = LongBenchV2Suite(ROWS)
    assert list(suite.tasks) == ["short", "medium", "long"]
    found = list(suite.samples(plain, "short", 4000, 9))
    assert [x.id for x in found] == ["longbench-v2/short/4000/0", "longbench-v2/short/4000/1"]
    assert [x.turns[0].outputs for x in found] == [("B",), ("D",)]
    assert found[0].family == "Long In-context Learning"
    hard = next(suite.samples(plain, "long", 4000, 1))
    assert hard.extra == {"difficulty": "hard"}


def test_the_prompt_is_the_published_one_with_its_parts_stripped(plain):
    made = next(LongBenchV2Suite([row(0, context=" $Q$ text\n")]).samples(plain, "short", 4000, 1))
    assert made.context == (
        "Please read the following text and answer the question below.\n\n<text>\n$Q$ text"
    )
    assert made.turns[0].question == (
        "\n</text>\n\nWhat is the correct answer to this question: What is 0?\nChoices:\n(A) one\n"
        "(B) two\n(C) three\n(D) four\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert made.turns[0].max_new_tokens == 128


def test_long_prompts_lose_their_middle(chatty):
    made = next(LongBenchV2Suite(ROWS).samples(chatty, "short", 700, 1))
    assert 698 <= prompt_tokens(chatty, made) + 128 <= 700
    assert made.turns[0].question.startswith("\n</text>")


def test_the_right_choice_scores_100(plain):
    suite = LongBenchV2Suite(ROWS)
    made = next(suite.samples(plain, "short", 4000, 1))
    assert suite.score(made, 0, " The correct answer is (B) two.") == 100
    assert suite.score(made, 0, "The correct answer is (A)") == 0
    assert suite.score(made, 0, "two") == 0


def test_files_and_saved_data_sets_are_read(tmp_path, plain):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    datasets.disable_progress_bars()
    expected = list(LongBenchV2Suite(ROWS).samples(plain, "short", 4000, 9))
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved" / "v2")
    for source in (tmp_path / "data.json", tmp_path, tmp_path / "saved" / "v2"):
        assert list(LongBenchV2Suite(source).samples(plain, "short", 4000, 9)) == expected


def test_what_is_no_question_is_an_error(plain):
    with pytest.raises(ConfigError, match="no task tiny; it has short, medium, long"):
        next(LongBenchV2Suite(ROWS).samples(plain, "tiny", 4000, 1))
    with pytest.raises(ConfigError, match=r"data, row 2, .*answer"):
        next(LongBenchV2Suite([row(0), row(1, answer="E")]).samples(plain, "short", 4000, 1))
    with pytest.raises(ConfigError, match="no rows of LongBench v2"):
        next(LongBenchV2Suite([]).samples(plain, "short", 4000, 1))
    with pytest.raises(ConfigError, match="there is no"):
        next(LongBenchV2Suite("./nothing").samples(plain, "short", 4000, 1))
