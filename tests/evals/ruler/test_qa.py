"""Questions and documents: rows of both data sets in all their forms, and prompts of them."""

import re
from random import Random

import pytest

from engine.errors import ConfigError
from evals.ruler.documents import Corpus, Question, hotpotqa, squad
from evals.ruler.qa import Qa

DOCUMENT = re.compile(r"Document (\d+):\n(.*?)(?=\n\nDocument \d+:\n|\n\nAnswer the|\n\n$)", re.S)


def parts(made):
    return DOCUMENT.findall(made.context.split("given documents.\n\n", 1)[1])


def test_squad_has_every_paragraph_once_and_the_answerable_questions_in_order(squad_rows):
    corpus = squad(squad_rows)
    assert len(corpus.documents) == len(set(corpus.documents)) == 36
    assert len(corpus.questions) == 36
    first = corpus.questions[0]
    assert first.text == "What is in Ants0?"
    assert first.outputs == ("answer Ants0", "the answer Ants0")
    assert first.own == (0,)
    assert first.near == tuple(range(1, 12))
    assert corpus.questions[13].near == (12, *range(14, 24))


def test_squad_reads_the_whole_file_s_form_and_the_hub_s(squad_rows):
    flat = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [x["text"] for x in qa["answers"]], "answer_start": []},
        }
        for article in squad_rows
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    expected = squad(squad_rows)
    assert squad([{"version": "v2.0", "data": squad_rows}]) == expected
    assert squad(flat) == expected


def test_hotpotqa_keeps_titles_joins_sentences_and_counts_shared_paragraphs_once(hotpotqa_rows):
    corpus = hotpotqa(hotpotqa_rows)
    assert len(corpus.documents) == 8 * 3 + 1
    assert corpus.documents[0].startswith("Title 0.0\nTitle 0.0 starts. Title 0.0 ends.Title")
    assert corpus.questions[1] == Question("Who is 1?", ("person 1",), (4, 5, 6, 3))
    hub = [
        row
        | {
            "context": {
                "title": [title for title, _ in row["context"]],
                "sentences": [sentences for _, sentences in row["context"]],
            }
        }
        for row in hotpotqa_rows
    ]
    assert hotpotqa(hub) == corpus


@pytest.mark.parametrize("parse", [squad, hotpotqa])
@pytest.mark.parametrize("row", [{}, {"question": 1}, {"paragraphs": [1]}, {"context": 1}, 3])
def test_a_row_of_another_form_is_named(parse, row, squad_rows, hotpotqa_rows):
    good = (squad_rows if parse is squad else hotpotqa_rows)[0]
    with pytest.raises(ConfigError, match="row 1 is none of"):
        parse([good, row])


def test_rows_without_an_answer_are_refused(squad_rows):
    with pytest.raises(ConfigError, match="no question with an answer"):
        squad([])
    empty = [{"title": "A", "context": "a", "question": "b?", "answers": {"text": []}}]
    with pytest.raises(ConfigError, match="no question with an answer"):
        squad(empty)


@pytest.mark.parametrize("size", [0, 3, 10, 100])
def test_the_answer_s_document_is_there_once_and_documents_are_numbered(size, squad_rows):
    corpus = squad(squad_rows)
    for index in range(36):
        made = Qa(corpus).draft(Random(index), index, size)
        found = parts(made)
        assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
        texts = [text for _, text in found]
        own = corpus.documents[corpus.questions[index].own[0]]
        assert texts.count(own) == 1
        assert any(output in own for output in made.outputs)
        assert made.question.endswith(f"\n\nQuestion: {corpus.questions[index].text}")


def test_paragraphs_of_the_same_article_come_first(squad_rows):
    corpus = squad(squad_rows)
    near = {corpus.documents[x] for x in corpus.questions[0].near}
    few = [text for _, text in parts(Qa(corpus).draft(Random(0), 0, 8))]
    assert len(few) > 2
    assert set(few[:]) - near == {corpus.documents[0]}
    many = [text for _, text in parts(Qa(corpus).draft(Random(0), 0, 100))]
    assert near < set(many)
    assert len(many) == len(set(many)) == 36 or len(many) > len(near) + 1


def test_the_answer_s_document_stands_anywhere(squad_rows):
    corpus = squad(squad_rows)
    places = set()
    for seed in range(60):
        texts = [text for _, text in parts(Qa(corpus).draft(Random(seed), 0, 20))]
        places.add(texts.index(corpus.documents[0]) / (len(texts) - 1))
    assert min(places) == 0
    assert max(places) == 1


def test_documents_come_again_when_all_are_used(hotpotqa_rows):
    corpus = hotpotqa(hotpotqa_rows)
    texts = [text for _, text in parts(Qa(corpus).draft(Random(0), 2, 200))]
    for number, text in enumerate(corpus.documents):
        count = texts.count(text)
        assert count == 1 if number in corpus.questions[2].own else count > 1


def test_there_is_nothing_to_add_where_all_documents_are_the_question_s():
    alone = Corpus(("one",), (Question("What?", ("x",), (0,)),))
    assert Qa(alone).most == 0
    assert len(parts(Qa(alone).draft(Random(0), 0, 0))) == 1


def test_a_question_beyond_the_last_is_refused(hotpotqa_rows):
    with pytest.raises(ConfigError, match="there are 8 questions, question 9 was asked for"):
        Qa(hotpotqa(hotpotqa_rows)).draft(Random(0), 8, 0)
