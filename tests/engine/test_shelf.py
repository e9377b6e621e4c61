"""Documents for any conversation: where they stand, and that nothing of them is left."""

import pytest

from engine import forget
from engine.errors import ConfigError, PromptError
from engine.library import Unknown
from engine.question import around_chat
from engine.shelf import Shelf
from tests.engine.rag import FACTS, Parts, blocks, documents


@pytest.fixture(scope="module")
def parts():
    return Parts()


@pytest.fixture
def engine(parts):
    with parts.engine(block_tokens=16) as made:
        yield made


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def shelf(engine) -> Shelf:
    return Shelf(engine, around_chat(engine, user("?")).before)


def add(engine, shelf, given):
    read = shelf.read(given)
    engine.precompute(shelf.add(read), shelf.prefix)
    shelf.stored(read)
    return read


def answered(engine, shelf, messages, sources) -> str:
    """Through the engine alone."""
    reading = shelf.reading(around_chat(engine, messages), sources)
    [done] = engine.generate(reading.segments, max_new_tokens=6)
    reading.end(done.tokens, done)
    return str(done.text).strip(" .")


def test_texts_stand_in_front_of_what_the_user_says_first(engine):
    messages = [
        {"role": "system", "content": "Be brief."},
        *user("First."),
        {"role": "assistant", "content": "Yes."},
        *user("Last."),
    ]
    before, behind = around_chat(engine, messages)
    decode = engine.tokenizer.decode
    assert decode(before).endswith("Be brief. ")
    assert decode(behind) == "First. Yes. Last."
    assert (*before, *behind)[: len(before)] == around_chat(engine, messages[:2]).before


def test_a_conversation_has_to_have_a_place_for_texts(engine):
    with pytest.raises(PromptError, match="a user says"):
        around_chat(engine, [{"role": "system", "content": "Be."}])
    with pytest.raises(PromptError, match="does not keep the texts"):
        around_chat(engine, user("?"))
    engine.tokenizer.chat_template, kept = None, engine.tokenizer.chat_template
    try:
        with pytest.raises(PromptError, match="no chat template"):
            around_chat(engine, user("?"))
    finally:
        engine.tokenizer.chat_template = kept


def test_documents_chunks_and_texts_are_read_in_the_order_of_the_request(engine):
    library = shelf(engine)
    first, second = add(engine, library, documents()[:2])
    inline = {"text": "Something else."}
    around = around_chat(engine, user("What?"))
    reading = library.reading(around, [second.chunks[0].id, inline, first.id])
    pieces = library.read([inline])[0].chunks
    expected = [second.chunks[0], *pieces, *first.chunks]
    assert reading.segments.chunks == tuple(chunk.tokens for chunk in expected)
    assert reading.segments.question == around.behind
    reading.end([], None)


def test_answers_come_from_documents(engine):
    library = shelf(engine)
    add(engine, library, documents())
    ids = [document["id"] for document in documents()]
    for fact in FACTS:
        assert answered(engine, library, user(fact.question), ids) == fact.value


def test_nothing_is_left_of_a_document_whatever_it_stood_behind(engine):
    library = shelf(engine)
    held = blocks(engine)
    [document] = add(engine, library, documents()[:1])
    for system in ("One.", "Two."):
        messages = [{"role": "system", "content": system}, *user(FACTS[0].question)]
        for _ in range(2):
            assert answered(engine, library, messages, [document.id]) == FACTS[0].value
    assert blocks(engine) != held
    library.delete(document.id)
    assert blocks(engine) == held


def test_a_document_that_is_deleted_while_it_is_read_leaves_nothing(engine):
    library = shelf(engine)
    held = blocks(engine)
    [document] = add(engine, library, documents()[:1])
    messages = [{"role": "system", "content": "Other."}, *user(FACTS[0].question)]
    reading = library.reading(around_chat(engine, messages), [document.id])
    library.delete(document.id)
    [done] = engine.generate(reading.segments, max_new_tokens=2)
    assert blocks(engine) != held
    reading.end(done.tokens, done)
    assert blocks(engine) == held


def test_prefixes_of_which_nothing_is_stored_are_forgotten(engine, monkeypatch):
    monkeypatch.setattr(forget, "ORIGINS", 4)
    library = shelf(engine)
    [document] = add(engine, library, documents()[:1])
    origins = library._library._catalogue.origins

    def read(number: int):
        messages = [{"role": "system", "content": f"It is {number} o'clock."}, *user("What?")]
        return library.reading(around_chat(engine, messages), [document.id])

    running = read(0)  # its KV may still come
    for number in range(1, 20):
        reading = read(number)
        if number == 5:
            engine.generate(reading.segments, max_new_tokens=1)
            kept = reading.segments.prefix
        reading.end([], None)
    assert len(origins) < 12
    known = {origin.prefix for origin in origins}
    assert {library.prefix, running.segments.prefix, kept} <= known
    running.end([], None)
    library.delete(document.id)


def test_unknown_ids_are_told_apart_from_other_mistakes(engine):
    library = shelf(engine)
    for ask in (library.document, library.delete):
        with pytest.raises(Unknown):
            ask("none")
    with pytest.raises(Unknown):
        library.reading(around_chat(engine, user("?")), ["none"])
    with pytest.raises(PromptError, match="documents is empty"):
        library.reading(around_chat(engine, user("?")), [])
    with pytest.raises(PromptError, match="is empty"):
        library.read([{"text": "  "}])
    with pytest.raises(ConfigError, match="chunk_tokens"):
        Shelf(engine, (), 10**6)


def test_another_tenant_sees_nothing(engine):
    first, second = engine.of_tenant("one"), engine.of_tenant("two")
    theirs, others = shelf(first), shelf(second)
    [document] = add(first, theirs, documents()[:1])
    assert others.documents() == []
    with pytest.raises(Unknown):
        others.document(document.id)
    assert [one.id for one in theirs.documents()] == [document.id]
