"""Documents for any conversation: where they stand, and that nothing of them is left."""

import threading

import pytest

from engine.errors import ConfigError, PromptError, PromptTooLong
from engine.perfmodel import Decision
from engine.rag import forget
from engine.rag.catalogue import Catalogue, CatalogueError
from engine.rag.library import Library, Unknown
from engine.rag.question import around_chat
from engine.rag.shelf import Shelf
from engine.request import Running
from engine.service.ask import Ask
from engine.service.service import Service
from engine.splitter import Splitter
from kvstore.block import Precision
from tests.engine.rag.corpus import FACTS, Parts, blocks, documents


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
    reading.begin()
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


def test_no_more_is_read_than_there_is_room_for(engine, monkeypatch):
    library = shelf(engine)
    [document] = add(engine, library, documents()[:1])
    around = around_chat(engine, user("What?"))
    exact = len(library.reading(around, [document.id] * 3).segments.tokens)
    assert len(library.reading(around, [document.id] * 3, exact).segments.tokens) == exact
    with pytest.raises(PromptTooLong, match=f"more than {exact - 1} tokens"):
        library.reading(around, [document.id] * 3, exact - 1)
    seen, parts = [], Library.parts
    monkeypatch.setattr(Library, "parts", lambda self, id_: seen.append(id_) or parts(self, id_))
    with pytest.raises(PromptTooLong):
        library.reading(around, [document.id] * 6000)
    assert len(seen) <= engine.model.shape.max_positions // document.tokens + 1


def test_a_text_for_which_there_is_clearly_no_room_is_not_even_cut(engine, monkeypatch):
    library = shelf(engine)
    around = around_chat(engine, user("What?"))
    monkeypatch.setattr(Splitter, "split", lambda *args, **options: pytest.fail("it was cut"))
    for field in ("text", "title"):
        with pytest.raises(PromptTooLong):
            library.reading(around, [{"text": "a", field: "word " * 1_000_000}])


def test_a_prompt_that_does_not_run_leaves_nothing_on_record(engine):
    library = shelf(engine)
    [document] = add(engine, library, documents()[:1])
    messages = [{"role": "system", "content": "Other."}, *user("What?")]
    catalogue = library._library._catalogue
    before = list(catalogue.origins)
    reading = library.reading(around_chat(engine, messages), [document.id])
    assert list(catalogue.origins) == before
    reading.begin()
    assert len(catalogue.origins) == len(before) + 1
    reading.withdraw()
    assert not catalogue.traces
    assert not library._library._reading
    library.delete(document.id)


def test_a_reading_that_cannot_begin_is_not_counted(engine, monkeypatch):
    def full(*args):
        raise CatalogueError("no space")

    library = shelf(engine)
    [document] = add(engine, library, documents()[:1])
    for method, module in (("remember", Catalogue), ("prune", forget.Forgetting)):
        reading = library.reading(around_chat(engine, user("?")), [document.id])
        with monkeypatch.context() as patch:
            patch.setattr(module, method, full)
            with pytest.raises(CatalogueError):
                reading.begin()
        assert not library._library._reading
    library.delete(document.id)


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
    reading.begin()
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
        reading = library.reading(around_chat(engine, messages), [document.id])
        reading.begin()
        return reading

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


@pytest.mark.parametrize("read", [False, True])
def test_a_prefix_that_others_forget_before_its_kv_is_stored_is_on_record_again(
    parts, tmp_path, monkeypatch, read
):
    monkeypatch.setattr(forget, "ORIGINS", 1)

    def saying(system: str):
        return around_chat(engine, [{"role": "system", "content": system}, *user("What?")])

    with parts.engine(tmp_path / "store", block_tokens=16) as engine:
        ours, theirs = shelf(engine), Shelf(engine, saying("Theirs.").before)
        documents_ = ours.read(documents()[:1])
        chunks, id_ = ours.add(documents_), documents_[0].id
        reading = ours.reading(saying("Ours."), [id_])
        if read:
            reading.begin()
        for number in range(3):
            other = theirs.reading(saying(f"It is {number} o'clock."), [id_])
            other.begin()
            other.end([], None)
        if read:
            [done] = engine.generate(reading.segments, max_new_tokens=1)
            reading.end(done.tokens, done)
        else:
            engine.precompute(chunks, ours.prefix)
            ours.stored(documents_)
        assert blocks(engine) != {0}
        theirs.delete(id_)
        assert blocks(engine) == {0}


def test_prefixes_of_which_something_is_stored_are_not_searched_again(engine, monkeypatch):
    monkeypatch.setattr(forget, "ORIGINS", 0)
    library = shelf(engine)
    documents_ = add(engine, library, documents())
    last = documents_[-1]
    messages = [{"role": "system", "content": "Other."}, *user("What?")]
    reading = library.reading(around_chat(engine, messages), [last.id])
    reading.begin()
    engine.generate(reading.segments, max_new_tokens=1)
    reading.withdraw()
    made, forgetting = [], library._library._forgetting
    keys = forgetting._keys
    monkeypatch.setattr(forgetting, "_keys", lambda *a, **o: made.append(a) or keys(*a, **o))
    for _ in range(3):
        forgetting._enough_origins = 0
        forgetting.prune({library._library._origin})
    names = sum(len(document.chunks) for document in documents_) * len(Precision)
    assert len(made) == names  # of three searches the first alone made any
    for document in documents_:
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


def test_what_is_decoded_until_the_end_of_a_text_shows_is_deleted_with_it(parts, monkeypatch):
    ended, heard, events = threading.Event(), threading.Event(), []
    tell, end = Running.tell, Service._end

    def late(run, chosen):
        assert ended.wait(30)  # by then the whole answer is decoded
        return tell(run, chosen)

    def told(service, live):
        end(service, live)
        ended.set()

    def listen(event):
        events.append(event)
        heard.set()

    monkeypatch.setattr(Running, "tell", late)
    monkeypatch.setattr(Service, "_end", told)
    with parts.engine(block_tokens=32) as engine:
        computed = Decision(False, 1.0, "compute: for this test")
        monkeypatch.setattr(engine.blending.speeds, "decide", lambda work: computed)
        ours, texts = shelf(engine), ("The sky is grey today.", "It rained.")
        add(engine, ours, [{"id": text, "text": text} for text in texts])
        reading = ours.reading(around_chat(engine, user("What is it?")), texts)
        prompt = list(reading.segments.tokens)
        assert len(ours.prefix) < len(prompt) < 32  # all in the first block, and not all of it
        stop = engine.tokenizer.decode(engine.logits(prompt)[-1].argmax())
        reading.begin()
        service = Service(engine)
        service.submit(Ask(prompt=reading.segments, max_new_tokens=12, stop=(stop,)), listen)
        assert heard.wait(30)
        service.close()
        [only] = events
        reading.end([only.token], only.completion)
        assert only.completion.finish_reason == "stop"
        for text in texts:
            ours.delete(text)
        assert blocks(engine) == {0}
