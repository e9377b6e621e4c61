"""Needles: there once, where they should be, and nothing else like them."""

import re
from random import Random
from uuid import UUID

import pytest

from evals.ruler.draft import insert
from evals.ruler.essay import Essay, default_essay
from evals.ruler.niah import DEPTHS, Needles, Niah
from evals.ruler.suite import TASKS, Cell, Sources
from evals.ruler.templates import NOISE
from evals.ruler.words import load_words

TASK_NAMES = [name for name in TASKS if name.startswith("niah")]
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: (.+?)\.")
ESSAY = Essay.of("One two three four. Five six seven? Eight nine ten! " * 40)


def draft(needles, size=200, seed=1, essay=ESSAY):
    return Niah(needles, essay, load_words()).draft(Random(seed), 0, size)


def recipe(task):
    return TASKS[task].recipe(Sources(None, None, None), Cell(None, 4096, 128))


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_every_needle_is_there_once_and_its_value_nowhere_else(task, seed):
    made = recipe(task).draft(Random(seed), 0, 300)
    found = NEEDLE.findall(made.context)
    values = [value for _, _, value in found]
    assert len(set(values)) == len(values)
    asked = made.question.split(" for ")[1].split(" mentioned ")[0]
    keys = re.split(r", and |, ", asked)
    assert sorted(made.outputs) == sorted(value for _, key, value in found if key in keys)
    for value in made.outputs:
        assert made.context.count(value) == 1
        assert value not in made.question + made.prefix


@pytest.mark.parametrize(
    ("task", "keys", "outputs", "lines"),
    [
        ("niah_single_1", 1, 1, 101),
        ("niah_multikey_1", 4, 1, None),
        ("niah_multikey_2", 101, 1, 101),
        ("niah_multikey_3", 101, 1, 101),
        ("niah_multivalue", 1, 4, None),
        ("niah_multiquery", 4, 4, None),
    ],
)
def test_a_task_has_its_number_of_keys_values_and_lines(task, keys, outputs, lines):
    made = recipe(task).draft(Random(3), 0, 100)
    assert len({key for _, key, _ in NEEDLE.findall(made.context)}) == keys
    assert len(made.outputs) == outputs
    if lines:  # the first and the last line of the context are the template's
        assert len(made.context.rstrip("\n").split("\n")) == lines + 1


def test_keys_and_values_are_of_the_task_s_kinds():
    (number,) = recipe("niah_single_2").draft(Random(0), 0, 50).outputs
    assert re.fullmatch(r"[1-9]\d{6}", number)
    (uuid,) = recipe("niah_single_3").draft(Random(0), 0, 50).outputs
    assert UUID(uuid).version == 4
    made = recipe("niah_multikey_3").draft(Random(0), 0, 20)
    for _, key, value in NEEDLE.findall(made.context):
        assert UUID(key).version == UUID(value).version == 4
    words = load_words()
    for _, key, _ in NEEDLE.findall(recipe("niah_multikey_2").draft(Random(0), 0, 50).context):
        assert any(
            key[:i] in words.adjectives and key[i + 1 :] in words.nouns
            for i, character in enumerate(key)
            if character == "-"
        )


def test_one_answer_is_asked_for_in_the_singular_and_several_are_listed():
    one = draft(Needles("essay", keys=4))
    assert one.context.startswith("A special magic number is hidden")
    assert one.question.startswith("What is the special magic number for ")
    assert one.prefix.endswith(" mentioned in the provided text is")
    assert "One of the special magic numbers for " in one.context
    several = draft(Needles("essay", keys=4, queries=4))
    assert several.context.startswith("Some special magic numbers are hidden")
    assert re.search(r"for \S.*, \S.*, \S.*, and \S.* mentioned", several.question)
    assert len(several.outputs) == 4


def test_answers_come_in_the_order_of_the_question():
    made = draft(Needles("essay", keys=4, queries=4))
    value = {key: value for _, key, value in NEEDLE.findall(made.context)}
    keys = re.split(r", and |, ", made.question.split(" for ")[1].split(" mentioned ")[0])
    assert [value[key] for key in keys] == list(made.outputs)


def test_an_essay_is_whole_around_needles_that_stand_between_sentences():
    for seed in range(30):
        made = draft(Needles("essay", keys=4), size=203, seed=seed)
        body = made.context.split("\n")[1]
        bare = re.sub(r" ?One of the special magic numbers for .+? is: \d+\.", "", body).strip()
        assert bare == " ".join(ESSAY.words[:203])
        for needle in NEEDLE.finditer(body):
            assert re.fullmatch(r"|.*[.!?] ", body[: needle.start()]) or needle.end() == len(body)


def test_all_depths_from_the_first_sentence_to_the_last_occur():
    depths = [draft(Needles("essay"), size=400, seed=seed).depth for seed in range(300)]
    assert min(depths) == 0
    assert max(depths) == pytest.approx(1, abs=0.01)
    assert len({round(depth, 2) for depth in depths}) >= 38
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.05)
    assert len(DEPTHS) == 40
    assert DEPTHS[:3] + DEPTHS[-2:] == [0, 3, 5, 97, 100]


def test_depth_is_how_much_of_the_haystack_comes_before_the_needle():
    made = draft(Needles("noise"), size=50, seed=5)
    lines = made.context.rstrip("\n").split("\n")[1:]
    place = next(i for i, line in enumerate(lines) if line != NOISE)
    assert made.depth == pytest.approx(place / 50, abs=0.01)
    assert draft(Needles("essay", keys=4), seed=5).depth is not None
    assert draft(Needles("essay", values=4), seed=5).depth is None


def test_the_needles_are_the_same_at_every_size():
    for kind in (Needles("essay", keys=4), Needles("noise"), Needles("needle")):
        short, long = draft(kind, size=20), draft(kind, size=150)
        assert (short.question, short.outputs) == (long.question, long.outputs)


def test_a_value_that_the_essay_has_is_not_drawn():
    first = draft(Needles("essay", keys=1), size=5).outputs[0]
    known = Essay.of(f"The code is {first}, they said.")
    assert draft(Needles("essay", keys=1), size=5, essay=known).outputs[0] != first


def test_an_essay_begins_again_where_it_ends_and_keeps_every_word():
    essay = Essay.of('He said "stop."  She\nwent. (Really?) Yes')
    assert essay.sentences(8) == ['He said "stop."', "She went.", "(Really?)", "Yes He"]
    assert " ".join(essay.sentences(20)) == " ".join((essay.words * 3)[:20])
    assert len(default_essay().words) > 50_000


def test_sentences_of_chinese_text_end_too():
    essay = Essay.of("今天很好。 真的吗？ 「是的！」 再见")
    assert essay.sentences(4) == ["今天很好。", "真的吗？", "「是的！」", "再见"]


def test_lines_are_inserted_before_the_places_given():
    assert insert("abc", "12", [0, 3]) == ["1", "a", "b", "c", "2"]
    assert insert("abc", "12", [1, 1]) == ["a", "1", "2", "b", "c"]
    assert insert("", "1", [0]) == ["1"]
