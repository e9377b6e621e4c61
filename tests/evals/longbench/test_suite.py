"""LongBench as a suite: what is asked, how long it is, and what an answer scores."""

from itertools import islice

import pytest

from engine.errors import ConfigError
from evals.longbench import LongBenchSuite
from evals.longbench.rows import rows_of
from evals.longbench.tasks import TASKS
from evals.metrics import longbench_score
from evals.prompt import prompt_tokens
from tests.data import real_data


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1400, 3000])
def test_prompts_and_answers_are_as_long_as_asked_at_most(rows, chatty, task, length):
    for sample in LongBenchSuite(rows).samples(chatty, task, length, 3):
        used = prompt_tokens(chatty, sample) + sample.turns[0].max_new_tokens
        assert used <= length
        shorter = sample.context.count(f" of {task}. ") == 40
        assert shorter or used >= length - 1


def test_the_whole_prompt_is_asked_where_there_is_room(rows, plain):
    sample = next(LongBenchSuite(rows).samples(plain, "triviaqa", 4000, 1))
    row = rows["triviaqa"][0]
    assert sample.context == (
        "Answer the question based on the given passage. Only give me the answer and do not output "
        f"any other words. The following are some examples.\n\n{row['context']}"
    )
    assert sample.turns[0].question == "\n\nWhat is number 0?"
    assert (sample.family, sample.chat, sample.turns[0].max_new_tokens) == ("few-shot", False, 32)


def test_the_answers_score_100_and_nothing_scores_0(rows, plain):
    suite = LongBenchSuite(rows)
    for task in suite.tasks:
        for sample in suite.samples(plain, task, 3000, 3):
            assert suite.score(sample, 0, sample.turns[0].outputs[0]) == pytest.approx(100)
            assert suite.score(sample, 0, "") == 0


def test_too_short_a_length_says_what_is_needed(rows, plain):
    suite = LongBenchSuite(rows)
    with pytest.raises(ConfigError, match=r"longbench/lcc/121 needs 122 tokens .*raise the length"):
        next(suite.samples(plain, "lcc", 121, 1))
    assert next(suite.samples(plain, "lcc", 122, 1)).context


def test_a_data_set_without_a_row_is_an_error(plain):
    with pytest.raises(ConfigError, match="no row in the data of lcc"):
        next(LongBenchSuite({"lcc": []}).samples(plain, "lcc", 2000, 1))


def test_real_answers_score_100_beside_themselves():
    folder = real_data("longbench/mini")
    suite, count = LongBenchSuite(folder), 0
    for task in suite.tasks:
        for row in islice(rows_of(folder, task), 4):
            answer = row.answers[0]
            scored = longbench_score(task, answer, row.answers, row.all_classes)
            assert scored == pytest.approx(1), task
            count += 1
    assert count == 84
