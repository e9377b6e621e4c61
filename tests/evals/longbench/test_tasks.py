"""Prompts: LongBench's bytes, and its rules of how they are asked."""

import hashlib
from importlib.resources import files

import pytest

from evals.longbench.tasks import TASKS, fill
from evals.metrics.longbench import METRICS

NO_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
NEW_TOKENS = {
    32: "hotpotqa 2wikimqa musique triviaqa passage_count passage_retrieval_en "
    "passage_retrieval_zh",
    64: "multifieldqa_en multifieldqa_zh trec lsht lcc repobench-p",
    128: "narrativeqa qasper dureader samsum",
    512: "gov_report qmsum multi_news vcsum",
}
SHA256 = {
    "prompts.json": "5c1231ee6c3f198b0021e9c1ab9b66cbbfb52c432e0ed821a5afe89eefa17fd8",
    "prompt_v2.txt": "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950",
}


@pytest.mark.parametrize("name", SHA256)
def test_the_prompts_are_the_published_bytes(name):
    data = files("evals.longbench").joinpath(name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256[name]


def test_there_are_the_21_data_sets_each_with_a_metric():
    assert len(TASKS) == 21
    assert list(TASKS) == list(METRICS)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_the_text_once_and_then_the_question(task):
    before, after = fill(task, "THE TEXT", "THE QUESTION")
    assert before.endswith("THE TEXT")
    asked = task not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    assert after.count("THE QUESTION") == asked
    assert "{" not in before + after


def test_the_oddities_are_kept():
    assert fill("narrativeqa", "", "")[0].count("asconcisely") == 1
    assert fill("narrativeqa", "", "")[1].count("asconcisely") == 1
    assert fill("qasper", "", "")[1].startswith("\n\n Answer the question")
    assert fill("multi_news", "", "")[0] == (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
    )
    assert fill("passage_count", "", "")[1].endswith("\n\nThe final answer is: ")
    assert fill("passage_retrieval_en", "", "x")[1].endswith("\n\nThe answer is: ")
    assert fill("passage_retrieval_zh", "", "x")[1].endswith("\n\n答案是：")
    assert fill("trec", "C", "Q") == (
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\nC",
        "\nQ",
    )
    assert fill("lcc", "C", "Q") == (
        "Please complete the code given below. \nC",
        "Next line of code:\n",
    )
    assert fill("repobench-p", "C", "Q")[1] == "QNext line of code:\n"


def test_braces_and_slots_in_a_text_are_only_text():
    before, after = fill("hotpotqa", "{input} {context} {0}", "{context} {x}")
    assert before.endswith("passages.\n{input} {context} {0}")
    assert after.endswith("\n\nQuestion: {context} {x}\nAnswer:")


def test_new_tokens_and_chat_are_longbenchs():
    for tokens, tasks in NEW_TOKENS.items():
        assert {TASKS[task].new_tokens for task in tasks.split()} == {tokens}
    assert sum(len(tasks.split()) for tasks in NEW_TOKENS.values()) == 21
    assert {task for task in TASKS if not TASKS[task].chat} == NO_CHAT
