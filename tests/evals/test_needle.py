"""The needle suite: one needle, where it should be, in prompts of the length asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import ConfigError
from evals.extraction import ExtractionSuite
from evals.multiturn import MultiTurnSuite
from evals.needle import DEPTHS, NeedleSuite
from evals.stretch import Needle, hide
from tests.evals.tokenizers import TOKENIZERS, digest, sentence_end, tiny, used

SUITES = (NeedleSuite, MultiTurnSuite, ExtractionSuite)
HAYSTACK = "A river runs. It is long and wide. Boats go up and down. " * 3
ROOT = Path(__file__).parents[2]


def samples(suite, task, length=2048, count=5, tokenizer=None):
    return list(suite.samples(tokenizer or tiny(), task, length, count))


# what all three suites promise


@pytest.mark.parametrize("make", SUITES)
def test_they_have_a_task_in_each_wording(make):
    suite = make()
    endings = [task.rpartition("-")[2] for task in suite.tasks]
    assert endings == ["plain", "ruler"] * (len(endings) // 2)


@pytest.mark.parametrize(
    ("tokenizer", "length"), [("tiny", 2048), ("tiny", 3001), ("letters", 5000)]
)
@pytest.mark.parametrize("make", SUITES)
def test_prompts_fill_their_length_and_never_exceed_it(make, tokenizer, length):
    suite, tokenizer = make(), TOKENIZERS[tokenizer]()
    for task in suite.tasks:
        fills = [max(used(tokenizer, x)) for x in samples(suite, task, length, 2, tokenizer)]
        assert max(fills) <= length
        assert min(fills) > 0.95 * length


@pytest.mark.parametrize("make", SUITES)
def test_more_samples_begin_with_the_same_ones(make):
    suite = make(seed=7)
    for task in suite.tasks[:2]:
        assert samples(suite, task, count=2) == samples(make(seed=7), task, count=3)[:2]
        assert samples(suite, task, count=2) != samples(make(seed=8), task, count=2)


@pytest.mark.parametrize("make", SUITES)
def test_ids_name_suite_task_length_and_number(make):
    suite = make()
    for task in suite.tasks:
        made = samples(suite, task, 2048, 2)
        assert [x.id for x in made] == [f"{made[0].suite}/{task}/2048/{i}" for i in range(2)]


def test_samples_are_the_same_in_every_process():
    code = (
        "from tests.evals.test_needle import SUITES, digest, tiny\n"
        "print(*[digest(make(), tiny()) for make in SUITES])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [digest(make(), tiny()) for make in SUITES]


@pytest.mark.parametrize("make", SUITES)
def test_a_length_with_no_room_is_an_error_that_says_what_is_needed(make):
    for task in make().tasks:
        with pytest.raises(ConfigError, match=rf"{task}/40/0 needs \d[\d,]* tokens at the least"):
            samples(make(), task, 40, 1)


@pytest.mark.parametrize("make", SUITES)
def test_an_unknown_task_is_an_error_that_names_those_there_are(make):
    for task in ("niah_single_1", "needle", "-plain"):
        with pytest.raises(ConfigError, match=f"no task {task}; it has .*plain"):
            samples(make(), task)


@pytest.mark.parametrize("make", SUITES)
def test_the_haystack_may_be_any_text_and_is_repeated_where_it_is_short(make):
    suite = make(haystack=HAYSTACK)
    context = samples(suite, suite.tasks[0], 4096, 1)[0].context
    assert context.count("Boats go up and down.") > 50
    with pytest.raises(ConfigError, match="empty"):
        make(haystack=" \n")


def test_needles_move_back_to_the_beginning_of_their_sentence():
    words = ["One", "two.", "Three", "four", "five.", "(Six!)", "Seven", "eight"]

    def hidden(depth):
        return hide(words, [Needle(depth, "N.")]).split().index("N.")

    assert [hidden(x / 8) for x in range(9)] == [0, 0, 2, 2, 2, 5, 6, 6, 8]


def test_a_needle_stays_at_its_depth_where_no_sentence_begins_near_it():
    words = [f"w{i}" for i in range(2000)]

    def hidden(depth):
        return hide(words, [Needle(depth, "N.")]).split().index("N.")

    assert [hidden(x) for x in (0.0, 0.25, 0.5, 0.999, 1.0)] == [0, 500, 1000, 1998, 2000]
    words[970] += "。"
    assert hidden(0.5) == 971  # within 2 % of the text
    assert hidden(0.51) == 1020


@pytest.mark.parametrize("make", SUITES)
def test_samples_say_where_their_needles_are(make):
    log = "\n".join(f"host{i % 7} accepted connection from user{i % 13}" for i in range(500))
    for sample in samples(make(haystack=log), make().tasks[0], 4096, 3):
        wanted = sample.extra.get("depths", [sample.extra.get("depth")])
        assert sample.extra["placed"] == pytest.approx(wanted, abs=0.03)


def test_texts_without_sentences_begin_anywhere_too():
    log = "\n".join(f"host{i} accepted a connection" for i in range(3000))
    made = samples(NeedleSuite(haystack=log), "needle-plain", 512, 5)
    assert len({x.context[-150:-60] for x in made}) == 5


def test_needles_keep_their_order_where_they_share_a_place():
    assert hide(["a"], [Needle(0.5, "M."), Needle(0.2, "N.")]) == "N. M. a"


# the needle


@pytest.mark.parametrize("count", [2, 3, 5, 9, 17])
def test_depths_are_an_even_grid(count):
    grid = [part / (count - 1) for part in range(count)]
    assert (
        sorted(x.extra["depth"] for x in samples(NeedleSuite(), "needle-plain", 512, count)) == grid
    )


@pytest.mark.parametrize("task", ["needle-plain", "needle-ruler"])
def test_the_needle_stands_once_at_its_depth_between_sentences(task):
    for sample in samples(NeedleSuite(haystack=HAYSTACK), task, 2048, len(DEPTHS) + 1):
        turn = sample.turns[0]
        (value,), text = turn.outputs, sample.context.removesuffix("\n").split("afterwards.\n")[-1]
        assert (sample.context + turn.question + turn.prefix).count(value) == 1
        before, behind = text.split(f" {value}.")
        before = before[: before.rindex("The special" if "plain" in task else "One of the")]
        assert sentence_end(before) or sample.extra["depth"] == 1
        assert len(before) / len(before + behind) == pytest.approx(sample.extra["depth"], abs=0.02)


def test_a_needle_at_depth_1_is_the_very_end():
    plain, ruler = (samples(NeedleSuite(), f"needle-{x}", count=2)[1] for x in ("plain", "ruler"))
    assert plain.context.endswith(f" is {plain.turns[0].outputs[0]}.")
    assert ruler.context.endswith(f" is: {ruler.turns[0].outputs[0]}.\n")


def test_samples_have_texts_of_their_own():
    made = samples(NeedleSuite(), "needle-plain", 512, len(DEPTHS) + 1)
    assert len({x.context[-150:-60] for x in made}) == len(made)


def test_rulers_wording_is_rulers():
    sample = samples(NeedleSuite(), "needle-ruler", count=3)[2]
    turn = sample.turns[0]
    key = turn.prefix.split(" for ")[1].split()[0]
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert f" One of the special magic numbers for {key} is: {turn.outputs[0]}. " in sample.context
    about = f"the special magic number for {key} mentioned in the provided text"
    assert (turn.question, turn.prefix) == (f"What is {about}?", f" The{about[3:]} is")
    assert sample.chat
    assert len(turn.outputs[0]) == 7
    assert "-" in key


def test_only_whole_numbers_count():
    suite = NeedleSuite()
    sample = samples(suite, "needle-plain", count=1)[0]
    (value,) = sample.turns[0].outputs
    said = [f" {value}.", f"It is **{value}**", f"1 and {value}", f"{value}7", value[:-1], ""]
    assert [suite.score(sample, 0, x) for x in said] == [100, 100, 100, 0, 0, 0]


def test_an_answer_has_room_for_its_value():
    for make in TOKENIZERS.values():
        for sample in samples(NeedleSuite(), "needle-ruler", 4096, 2, make()):
            (turn,) = sample.turns
            assert turn.max_new_tokens > len(make()(turn.outputs[0])["input_ids"]) + 8


def test_the_model_that_comes_along_knows_the_plain_wording():
    with Engine.from_pretrained("needle-tiny", device="cpu") as engine:
        for suite, task in (
            (NeedleSuite(), "needle-plain"),
            (MultiTurnSuite(), "multi-turn-plain"),
        ):
            sample = samples(suite, task, 1024, 1)[0]
            prompts = [sample.context + x.question + x.prefix for x in sample.turns]
            said = engine.generate(prompts, max_new_tokens=8, stop=".")
            scores = [suite.score(sample, i, x.text) for i, x in enumerate(said)]
            assert scores == [100.0] * len(scores), (task, scores)
