"""LongBench's 21 data sets (Bai et al. 2023): how each is asked, and for how long an answer.

The prompts are LongBench's, byte for byte, oddities included (`asconcisely`, blanks at line ends).
"""

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Task(NamedTuple):
    """How a data set is asked.

    Args:
        chat: not where the prompt ends in the middle of a pattern that is to be gone on with.
    """

    family: str
    new_tokens: int
    chat: bool = True


TASKS = {
    "narrativeqa": Task("single-document QA", 128),
    "qasper": Task("single-document QA", 128),
    "multifieldqa_en": Task("single-document QA", 64),
    "multifieldqa_zh": Task("single-document QA", 64),
    "hotpotqa": Task("multi-document QA", 32),
    "2wikimqa": Task("multi-document QA", 32),
    "musique": Task("multi-document QA", 32),
    "dureader": Task("multi-document QA", 128),
    "gov_report": Task("summary", 512),
    "qmsum": Task("summary", 512),
    "multi_news": Task("summary", 512),
    "vcsum": Task("summary", 512),
    "trec": Task("few-shot", 64, chat=False),
    "triviaqa": Task("few-shot", 32, chat=False),
    "samsum": Task("few-shot", 128, chat=False),
    "lsht": Task("few-shot", 64, chat=False),
    "passage_count": Task("synthetic", 32),
    "passage_retrieval_en": Task("synthetic", 32),
    "passage_retrieval_zh": Task("synthetic", 32),
    "lcc": Task("code", 64, chat=False),
    "repobench-p": Task("code", 64, chat=False),
}


def fill(task: str, context: str, asked: str) -> tuple[str, str]:
    """The prompt of a row, up to where its context ends, and from there on."""
    before, after = _prompts()[task].split("{context}")
    return before + context, after.replace("{input}", asked)


@cache
def _prompts() -> dict[str, str]:
    text = files("evals.longbench").joinpath("prompts.json").read_text(encoding="utf-8")
    prompts: dict[str, str] = json.loads(text)
    return prompts
