"""The rag suite: chunks that are cached one by one, and questions that need them."""

import json
import re
from itertools import pairwise

import pytest

from engine.errors import ConfigError
from evals.musique import musique
from evals.rag import CHUNKS, FACTS, PAIRS, RagSuite, segments
from tests.data import real_data
from tests.evals.tokenizers import TOKENIZERS, tiny, used

MADE = ("single-plain", "single-ruler", "two-hop")


def samples(suite, task, length=1536, count=3, tokenizer=None):
    return list(suite.samples(tokenizer or tiny(), task, length, count))


def chunks(sample):
    return [sample.context[a:b] for a, b in pairwise(sample.extra["chunks"])]


def row(number, needed=(1, 3), paragraphs=6, **changes):
    texts = [
        {
            "title": f"Title {i}",
            "paragraph_text": f"Text {number} {i}. " * 9,
            "is_supporting": i in needed,
        }
        for i in range(paragraphs)
    ]
    asked = {"question": f"Who is {number}?", "answer": "Ann Lee", "answer_aliases": ["A. Lee"]}
    return asked | {"answerable": True, "paragraphs": texts} | changes


@pytest.fixture
def read():
    """A suite with paragraphs."""
    return RagSuite(musique=[row(0), row(1, answerable=False), row(2, needed=(5,))])


# what is made


def test_a_task_that_it_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="rag has no task needle"):
        samples(RagSuite(), "needle")


@pytest.mark.parametrize(
    ("tokenizer", "length"), [("tiny", 1536), ("tiny", 3001), ("letters", 5000)]
)
def test_prompts_fill_their_length_and_never_exceed_it(tokenizer, length):
    tokenizer = TOKENIZERS[tokenizer]()
    for task in MADE:
        fills = [max(used(tokenizer, x)) for x in samples(RagSuite(), task, length, 2, tokenizer)]
        assert max(fills) <= length
        assert min(fills) > 0.95 * length


@pytest.mark.parametrize("task", MADE)
def test_more_samples_begin_with_the_same_ones_and_seeds_differ(task):
    assert samples(RagSuite(7), task, count=2) == samples(RagSuite(7), task, count=3)[:2]
    assert samples(RagSuite(7), task, count=1) != samples(RagSuite(8), task, count=1)
    ids = [sample.id for sample in samples(RagSuite(7), task, count=2)]
    assert ids == [f"rag/{task}/1536/0", f"rag/{task}/1536/1"]


def test_a_length_without_room_for_ten_chunks_is_refused():
    with pytest.raises(ConfigError, match="raise the length"):
        samples(RagSuite(), "two-hop", length=200)


def test_a_haystack_of_the_user_is_what_chunks_are_made_of():
    suite = RagSuite(haystack="A river runs. It is long. Boats go up and down. " * 3)
    (sample,) = samples(suite, "two-hop", count=1)
    assert all("Boats go up" in chunk for chunk in chunks(sample))


@pytest.mark.parametrize("task", MADE)
def test_the_chunks_follow_the_instructions_and_end_the_context(task):
    for sample in samples(RagSuite(), task):
        ends = sample.extra["chunks"]
        assert len(chunks(sample)) == CHUNKS
        assert ends == sorted(ends)
        assert ends[-1] == len(sample.context)
        assert all(chunk.startswith(" ") and len(chunk) > 100 for chunk in chunks(sample))


def test_the_second_hop_is_in_a_later_chunk_than_the_first():
    for sample in samples(RagSuite(), "two-hop", count=20):
        asked = re.fullmatch(r"\nWhat is (\w+)\?", sample.turns[0].question)[1]
        assert sample.turns[0].prefix == f" {asked} is"
        found = [re.findall(r"\w+ is the same as \w+\.|\w+ is \d{6}\.", x) for x in chunks(sample)]
        assert all(len(stated) <= 1 for stated in found)
        places = {stated[0]: at for at, stated in enumerate(found) if stated}
        assert len(places) == 2 * PAIRS
        (second,) = [said for said in places if said.startswith(f"{asked} is the same")]
        first = f"{second.split()[-1].rstrip('.')} is {sample.turns[0].outputs[0]}."
        assert places[first] < places[second]


@pytest.mark.parametrize("wording", ["plain", "ruler"])
def test_single_facts_are_in_chunks_of_their_own_and_one_is_asked_for(wording):
    pattern = {"plain": r"magic number for (\w+) is (\d+)", "ruler": r"for ([\w-]+) is: (\d+)"}
    for sample in samples(RagSuite(), f"single-{wording}"):
        found = [re.findall(pattern[wording], chunk) for chunk in chunks(sample)]
        assert sorted(map(len, found)) == [0] * (CHUNKS - FACTS) + [1] * FACTS
        facts = dict(stated[0] for stated in found if stated)
        (asked,) = [key for key in facts if f"for {key}" in sample.turns[0].question]
        assert sample.turns[0].outputs == (facts[asked],)


def test_instructions_come_before_the_chunks():
    (sample,) = samples(RagSuite(), "single-ruler", count=1)
    before = sample.context[: sample.extra["chunks"][0]]
    assert before.startswith("A special magic number is hidden within the following text.")
    assert before.endswith("afterwards.\n")
    assert sample.turns[0].question.startswith("\nWhat is the special magic number")


def test_a_number_is_scored_as_a_whole():
    (sample,) = samples(RagSuite(), "two-hop", count=1)
    value = sample.turns[0].outputs[0]
    assert RagSuite().score(sample, 0, f" {value}.") == 100
    assert RagSuite().score(sample, 0, f" {value[:3]}") == 0


# paragraphs


def test_questions_without_an_answer_are_left_out(read):
    asked = [sample.turns[0].question for sample in samples(read, "musique", 1000, count=2)]
    assert ["Who is 0?" in asked[0], "Who is 2?" in asked[1]] == [True, True]
    said = "2 of 2 questions go with 1,000 tokens, 3 were asked for: ask for fewer"
    with pytest.raises(ConfigError, match=said):
        samples(read, "musique", 1000, count=3)
    assert samples(read, "musique", 1000, count=0) == []


def test_paragraphs_that_hold_the_answer_stay_and_others_fill_the_room(read):
    counts = []
    for length in (400, 600, 1000):
        sample = next(read.samples(tiny(), "musique", length, 1))
        titles = [chunk.splitlines()[0] for chunk in chunks(sample)]
        assert {"Title 1", "Title 3"} <= set(titles)
        assert titles == sorted(titles)
        assert max(used(tiny(), sample)) <= length
        counts.append(len(titles))
    assert 2 <= counts[0] < counts[1] < counts[2] == 6


def test_too_short_a_length_for_the_needed_paragraphs_is_refused(read):
    with pytest.raises(ConfigError, match="raise the length"):
        samples(read, "musique", length=200, count=1)


def test_a_length_that_the_paragraphs_fill_less_than_half_is_refused(read):
    sample = next(read.samples(tiny(), "musique", 1000, 1))
    (tokens,) = used(tiny(), sample)
    assert next(read.samples(tiny(), "musique", 2 * tokens, 1)).context == sample.context
    said = rf"0 of 2 .* \(the first .*/0 has material for {tokens:,} tokens only: lower"
    with pytest.raises(ConfigError, match=said):
        samples(read, "musique", 2 * tokens + 2, 1)


def test_a_question_that_does_not_go_with_a_length_is_left_out_and_the_next_is_asked():
    few, all_needed = row(1, paragraphs=2), row(2, needed=range(6))
    suite = RagSuite(musique=[row(0), few, all_needed, row(3)])
    for length, numbers in ((600, (0, 1, 3)), (1000, (0, 2, 3))):
        ids = [sample.id for sample in samples(suite, "musique", length, count=3)]
        assert ids == [f"rag/musique/{length}/{number}" for number in numbers]


def test_the_best_f1_over_the_answers_counts(read):
    (sample,) = samples(read, "musique", 1000, count=1)
    assert sample.turns[0].outputs == ("Ann Lee", "A. Lee")
    assert read.score(sample, 0, "Ann Lee") == 100
    assert read.score(sample, 0, "lee") == pytest.approx(100)  # articles do not count
    assert read.score(sample, 0, "Bob") == 0


def test_rows_of_another_form_are_named():
    with pytest.raises(ConfigError, match="row 1 is none of MuSiQue: KeyError: 'question'"):
        musique([row(0), {"paragraphs": []}])
    with pytest.raises(ConfigError, match="no question with an answer"):
        musique([row(0, answerable=False)])


def test_missing_paragraphs_are_said_to_be_so_and_the_rest_works(monkeypatch):
    monkeypatch.delenv("HEADRACE_DATA", raising=False)
    suite = RagSuite()
    with pytest.raises(ConfigError, match="--musique"):
        samples(suite, "musique")
    assert samples(suite, "two-hop", count=1)


def test_a_file_of_paragraphs_is_read(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row(0)]))
    assert samples(RagSuite(musique=tmp_path), "musique", 1000, count=1)


def test_real_paragraphs_make_prompts():
    suite = RagSuite(musique=real_data("musique"))
    for sample in samples(suite, "musique", 4096, 5):
        assert len(chunks(sample)) > 5
        assert max(used(tiny(), sample)) <= 4096


# as the store takes them


@pytest.mark.parametrize("task", [*MADE, "musique"])
@pytest.mark.parametrize("tokenizer", ["tiny", "letters"])
def test_segments_are_the_prompt_up_to_the_answer(read, task, tokenizer):
    tokenizer = TOKENIZERS[tokenizer]()
    sample = next(read.samples(tokenizer, task, 1000 if task == "musique" else 4000, 1))
    cut, turn = segments(tokenizer, sample), sample.turns[0]
    assert cut.prefix[0] == tokenizer.bos_token_id
    pieces = [tokenizer.decode(chunk) for chunk in cut.chunks]
    assert pieces == chunks(sample)
    before = tokenizer.decode(cut.prefix[1:])
    assert before == sample.context[: sample.extra["chunks"][0]]
    asked = turn.question + turn.prefix
    assert tokenizer.decode(cut.question) in (asked, asked + " ")


def test_the_next_token_is_the_first_of_the_value():
    """A blank before it, where that is a token of its own, says nothing and is given."""
    tokenizer = tiny()
    sample = next(RagSuite().samples(tokenizer, "single-plain", 1536, 1))
    turn, asked = sample.turns[0], segments(tokenizer, sample).question
    text = f"{turn.question}{turn.prefix} {turn.outputs[0]}"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(asked)] == list(asked)
    assert tokenizer.decode(whole[len(asked) :]).strip() == turn.outputs[0]
    assert tokenizer.decode(whole[len(asked)]).strip()


def test_a_chunk_is_the_same_tokens_wherever_it_stands():
    sample = next(RagSuite().samples(tiny(), "two-hop", 1536, 1))
    for text, tokens in zip(chunks(sample), segments(tiny(), sample).chunks, strict=True):
        assert tuple(tiny()(text, add_special_tokens=False)["input_ids"]) == tokens
