"""The suite: thirteen tasks, at any length that is possible, the same everywhere."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from evals.metrics.ruler import ALL, ANY
from evals.prompt import ask, prompt_tokens
from evals.ruler import TASKS, RulerSuite
from tests.data import real_data

ROOT = Path(__file__).parents[3]
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
FAMILIES = {
    "niah_single_1": "single needle",
    "niah_single_2": "single needle",
    "niah_single_3": "single needle",
    "niah_multikey_1": "multi-key",
    "niah_multikey_2": "multi-key",
    "niah_multikey_3": "multi-key",
    "niah_multivalue": "multi-value",
    "niah_multiquery": "multi-query",
    "vt": "tracing",
    "cwe": "aggregation",
    "fwe": "aggregation",
    "qa_1": "QA",
    "qa_2": "QA",
}


@pytest.fixture
def suite(squad_rows, hotpotqa_rows):
    return RulerSuite(squad=squad_rows, hotpotqa=hotpotqa_rows)


def fills(tokenizer, samples):
    """Shares of the length that samples and their answers use."""
    return [(ask(tokenizer, x)[0].tokens + x.turns[0].max_new_tokens) / x.length for x in samples]


def test_there_are_thirteen_tasks_with_a_metric_each(suite):
    assert suite.tasks == tuple(FAMILIES)
    assert set(suite.tasks) == {*ALL, *ANY}
    for name, task in TASKS.items():
        assert task.family == FAMILIES[name]
        assert task.new_tokens == NEW_TOKENS[name.split("_")[0]]


@pytest.mark.parametrize("task", FAMILIES)
def test_prompts_fill_the_length_and_never_exceed_it(task, suite, bpe):
    for length, chat in ((2048, True), (4096, False)):
        suite.chat = chat
        used = fills(bpe, suite.samples(bpe, task, length, 3))
        assert max(used) <= 1
        assert sum(used) / len(used) >= 0.9
        assert min(used) >= 0.94  # of the longest lines, 60 tokens, less than one is missing


@pytest.mark.parametrize("task", [x for x in FAMILIES if not x.startswith("qa") and x != "cwe"])
def test_any_tokenizer_will_do(task, suite, tiny, words):
    for tokenizer, length in ((tiny, 2048), (words, 1500)):
        used = fills(tokenizer, suite.samples(tokenizer, task, length, 3))
        assert max(used) <= 1
        assert min(used) >= 0.95


def test_real_questions_fill_the_length(bpe):
    suite = RulerSuite(squad=real_data("squad"), hotpotqa=real_data("hotpotqa"))
    for task, length in (("qa_1", 2048), ("qa_1", 8192), ("qa_2", 8192)):
        used = fills(bpe, suite.samples(bpe, task, length, 4))
        assert max(used) <= 1
        assert sum(used) / len(used) >= 0.95


@pytest.mark.parametrize("task", FAMILIES)
def test_the_parts_are_the_prompt_and_the_context_ends_where_the_question_begins(task, suite, bpe):
    sample = next(suite.samples(bpe, task, 4096, 1))
    (turn,) = sample.turns
    whole = sample.context + turn.question + turn.prefix
    assert prompt_tokens(bpe, sample) == ask(bpe, sample)[0].tokens
    assert sample.context.endswith("\n")
    assert turn.question.startswith(("What ", "Question: ", "Answer the question"))
    assert whole.endswith(
        ("text are", "text is", "they are: ", "list are:", "words are:", "Answer:")
    )
    assert (sample.suite, sample.task, sample.family) == ("ruler", task, FAMILIES[task])
    assert sample.id == f"ruler/{task}/4096/0"
    assert (sample.length, turn.max_new_tokens) == (4096, TASKS[task].new_tokens)
    assert ("words" in sample.extra) == TASKS[task].words
    assert ("depth" in sample.extra) == ("single" in task or "multikey" in task)
    assert suite.score(sample, 0, " " + ", ".join(turn.outputs).upper()) == 100
    assert suite.score(sample, 0, "I do not know") == 0


@pytest.mark.parametrize("task", FAMILIES)
def test_more_samples_begin_with_the_same_ones_and_another_seed_gives_others(
    task, suite, words, squad_rows, hotpotqa_rows
):
    few = list(suite.samples(words, task, 2048, 2))
    assert list(suite.samples(words, task, 2048, 3))[:2] == few
    assert few[0].context != few[1].context
    other = RulerSuite(7, squad=squad_rows, hotpotqa=hotpotqa_rows)
    assert next(other.samples(words, task, 2048, 1)).context != few[0].context


def test_a_sample_asks_the_same_at_every_length(suite, words):
    for task in suite.tasks:
        short, long = (next(suite.samples(words, task, x, 1)) for x in (1500, 2500))
        if task not in ("cwe", "fwe"):  # whose lists are drawn whole
            assert short.turns == long.turns


SCRIPT = """
import hashlib
from evals.ruler import RulerSuite

class Words:
    chat_template = None
    def __call__(self, text, **options):
        return {"input_ids": list(range(len(text.split())))}

rows = [{"question": f"Who is {n}?", "answer": f"person {n}", "context":
    [[f"Title {n}.{i}", ["It starts.", " It ends."]] for i in range(3)]} for n in range(8)]
suite, digest = RulerSuite(hotpotqa=rows), hashlib.sha256()
for task in suite.tasks:
    if task != "qa_1":
        for sample in suite.samples(Words(), task, 1200, 2):
            digest.update(repr(sample).encode())
print(digest.hexdigest())
"""


def test_samples_are_the_same_in_every_process():
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 2 * hashlib.sha256().digest_size


@pytest.mark.parametrize("task", FAMILIES)
def test_an_impossible_length_is_refused_and_says_how_much_it_takes(task, suite, bpe):
    with pytest.raises(ConfigError, match=rf"ruler/{task}/150/0 needs [\d,]+ tokens at the least"):
        next(suite.samples(bpe, task, 150, 1))
    with pytest.raises(ConfigError, match="raise the length"):
        next(suite.samples(bpe, task, 1, 1))


def test_what_it_takes_at_the_least_is_enough(suite, bpe):
    with pytest.raises(ConfigError) as caught:
        next(suite.samples(bpe, "vt", 150, 1))
    needed = int(str(caught.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    sample = next(suite.samples(bpe, "vt", needed, 1))
    assert prompt_tokens(bpe, sample) + 30 == needed


def test_material_that_runs_out_is_told(words, hotpotqa_rows):
    suite = RulerSuite(haystack="Nothing here.", hotpotqa=hotpotqa_rows[:1])
    with pytest.raises(ConfigError, match=r"qa_2/4000/0 has material for [\d,]+ tokens only"):
        next(suite.samples(words, "qa_2", 4000, 1))
    with pytest.raises(ConfigError, match=r"cwe/90000/0 has material for [\d,]+ tokens only"):
        next(suite.samples(words, "cwe", 90_000, 1))


def test_a_long_list_of_words_goes_on_with_those_of_the_haystack(words):
    sample = next(RulerSuite().samples(words, "cwe", 90_000, 1))
    assert fills(words, [sample])[0] > 0.99


def test_the_haystack_is_the_user_s_text_and_python_s_where_there_is_none(words):
    mine = RulerSuite(haystack="Ships sail far. The sea is wide! " * 3)
    sample = next(mine.samples(words, "niah_single_2", 1000, 1))
    assert "The sea is wide! Ships sail far." in sample.context
    sample = next(RulerSuite().samples(words, "niah_single_2", 1000, 1))
    assert 'The "assert" statement' in sample.context
    with pytest.raises(ConfigError, match="the haystack is empty"):
        next(RulerSuite(haystack=" \n").samples(words, "niah_single_2", 1000, 1))


def test_unknown_tasks_and_missing_data_are_refused(words, monkeypatch):
    monkeypatch.delenv("HEADRACE_DATA", raising=False)
    with pytest.raises(ConfigError, match="RULER has no task niah; it has niah_single_1, "):
        next(RulerSuite().samples(words, "niah", 1000, 1))
    for task, setting in (("qa_1", "--squad"), ("qa_2", "--hotpotqa")):
        with pytest.raises(ConfigError, match=f"name it with {setting}, or set HEADRACE_DATA"):
            next(RulerSuite().samples(words, task, 1000, 1))


def test_without_the_word_lists_the_tasks_that_need_none_go_on(words, monkeypatch):
    from evals.ruler.words import load_words

    load_words.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ConfigError, match=r"wonderwords, which is missing: pip install"):
        next(RulerSuite().samples(words, "cwe", 2000, 1))
    for task in ("vt", "fwe", "niah_multikey_3"):
        assert next(RulerSuite().samples(words, task, 2000, 1)).task == task
    load_words.cache_clear()


def test_a_sample_takes_few_readings_of_its_text(suite, bpe):
    """Speed, in what it is made of: the time of a sample is that of so many tokenizations."""

    class Counting:
        chat_template = None
        longest = calls = 0

        def __call__(self, text, **options):
            self.calls += len(text) > 8_000
            return bpe(text, **options)

    for task in suite.tasks:
        if task != "qa_2":  # too few documents to be long
            counting = Counting()
            list(suite.samples(counting, task, 4096, 4))
            assert counting.calls <= 28, task
