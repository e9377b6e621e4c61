"""The RAG SDK: right answers from chunks in any order, and one clear line for what is wrong."""

import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from engine import BlendConfig, ConfigError, Engine, EngineConfig, ModelError, PromptError
from engine.method import preset
from engine.rag import Rag, Vectors
from kvstore.config import StoreConfig
from kvstore.errors import StoreError
from tests.engine.families import build
from tests.engine.rag.corpus import FACTS, PAGES, Parts, blocks, documents
from tests.kvstore.stored import values_file

SHORT = dict(max_new_tokens=8)


@pytest.fixture(scope="module")
def parts():
    return Parts()


@pytest.fixture(scope="module")
def rag(parts):
    with parts.engine() as engine:
        made = Rag(engine, 128)
        made.add(documents())
        yield made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def right(rag: Rag, **options) -> list[bool]:
    answers = [rag.ask(fact.question, **options, **SHORT) for fact in FACTS]
    return [fact.answered_by(a.text) for fact, a in zip(FACTS, answers, strict=True)]


def test_questions_are_answered_from_chunks_that_are_reused(rag):
    answer = rag.ask(FACTS[0].question, top_k=4, **SHORT)
    assert answer.text.strip() == "314159."
    assert (answer.finish_reason, answer.tokens[-1]) == ("stop", rag.engine.tokenize(".")[-1])
    assert answer.ttft_s > 0
    report = answer.report
    assert (report.chunks, report.missed, report.loaded) == (4, 0, True)
    assert report.reused_tokens + report.exact_tokens > 200
    assert right(rag) == [True] * 4


def test_citations_are_the_chunks_that_were_read_best_first(rag):
    answer = rag.ask(FACTS[1].question, top_k=3, **SHORT)
    hits = rag.search(FACTS[1].question, 3)
    assert [(c.chunk, c.score) for c in answer.citations] == [tuple(hit) for hit in hits]
    best = answer.citations[0]
    assert (best.documents, best.title) == ((PAGES[1],), f"On {PAGES[1]}")
    assert FACTS[1].statement.strip() in best.text


def test_chunks_may_be_named_and_are_read_in_that_order(rag):
    ids = [rag.search(fact.question, 1)[0].id for fact in FACTS]
    for order in (ids, ids[::-1], [ids[2], ids[0]]):
        answer = rag.ask(FACTS[0].question, order, **SHORT)
        assert [citation.chunk for citation in answer.citations] == order
        assert answer.citations[0].score is None
        assert FACTS[0].answered_by(answer.text)
    assert [citation.chunk for citation in rag.ask("What?", ids[0], **SHORT).citations] == ids[:1]


@pytest.mark.parametrize("policy", ["reposition", "boundary", "deviation", "query", "union"])
def test_the_policy_and_the_share_are_those_asked_for(parts, policy):
    settings = BlendConfig(controller=False)
    with parts.engine(blend=settings) as engine:
        rag = Rag(engine, 128, policy=policy, share=0.9)
        rag.add(documents())
        report = rag.ask(FACTS[0].question, **SHORT).report
        assert (report.policy, report.share) == (policy, 0.9)


def test_the_engines_blend_settings_are_the_default(parts):
    with parts.engine(blend=BlendConfig(policy="boundary", share=0.5, controller=False)) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        report = rag.ask(FACTS[0].question, **SHORT).report
        assert (report.policy, report.share) == ("boundary", 0.5)


def test_computing_everything_gives_the_engines_own_answer(parts):
    with parts.engine() as engine:
        rag = Rag(engine, 128, share=1.0)
        rag.add(documents())
        cited = rag._library.find(FACTS[2].question, 5)
        whole = rag._segments(cited, rag._behind(FACTS[2].question)).tokens
        [plain] = engine.generate([whole], **SHORT)
        assert rag.ask(FACTS[2].question, **SHORT).tokens == plain.tokens


def test_instructions_stand_in_front_of_the_chunks(parts):
    with parts.engine() as engine:
        rag = Rag(engine, 128, prefix="Answer with a number.")
        rag.add(documents())
        assert engine.tokenizer.decode(rag.prefix) == "<|bos|>Answer with a number.\n\n"
        assert rag.ask(FACTS[0].question, **SHORT).report.missed == 0
        other = Rag(engine, 128, prefix="Be brief.")
        other.add(documents())
        assert right(other) == [True] * 4


# adding


def test_adding_again_computes_nothing_and_gives_the_same_ids(parts, path):
    with parts.engine(path) as engine:
        rag, seen = Rag(engine, 128), []
        ids = rag.add(documents(), progress=lambda done, of: seen.append((done, of)))
        assert seen == [(n + 1, len(ids)) for n in range(len(ids))]
        before = blocks(engine)
        assert rag.add(documents()) == ids
        assert rag.add(documents()[1]) == [chunk.id for chunk in rag.documents()[1].chunks]
        assert blocks(engine) == before
        assert [d.id for d in rag.documents()] == list(PAGES)


def test_documents_may_be_texts_and_files(parts, tmp_path):
    file = tmp_path / "night watch.txt"
    file.write_text(f"Nothing moved.{FACTS[0].statement}")
    with parts.engine() as engine:
        rag = Rag(engine, 128)
        rag.add(file)
        rag.add(f"It rained.{FACTS[1].statement}")
        named, text = rag.documents()
        assert (named.id, named.title) == (str(file), "night watch.txt")
        assert (len(text.id), text.title) == (16, "")
        assert FACTS[0].answered_by(rag.ask(FACTS[0].question, top_k=1, **SHORT).text)
        assert FACTS[1].answered_by(rag.ask(FACTS[1].question, top_k=1, **SHORT).text)


@pytest.mark.parametrize("bad", ["", " \n", {"id": "x", "text": ""}])
def test_an_empty_document_is_refused_before_anything_is_stored(parts, path, bad):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        with pytest.raises(PromptError, match="is empty: nothing was added"):
            rag.add([documents()[0], bad])
        assert rag.documents() == []
        assert blocks(engine) == {0}
        assert not list(path.glob("rag-*"))


def test_a_document_with_tokens_that_the_model_does_not_have_is_on_no_record(
    parts, path, monkeypatch
):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        fewer = replace(engine.model.shape, vocab=100)
        monkeypatch.setattr(engine.model, "shape", fewer)
        with pytest.raises(PromptError, match=r"token id \d+ is out of range"):
            rag.add(documents())
        assert rag.documents() == []
        assert not list(path.glob("rag-*"))


def test_threads_that_add_the_same_document_agree(parts, path):
    with parts.engine(path) as engine:
        rags, got = [Rag(engine, 128), Rag(engine, 128)], {}

        def add(number):
            got[number] = rags[number % 2].add(documents())

        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got[0] == got[1] == got[2] == got[3]
        for rag in rags:
            assert len(rag.documents()) == 4
            assert right(rag) == [True] * 4
    assert_clean(parts, path)


def assert_clean(parts, path):
    with parts.engine(path) as engine:
        assert engine.store.audit().clean


# the next process


def test_another_engine_on_the_same_folder_answers_from_disk(parts, path):
    with parts.engine(path) as engine:
        ids = Rag(engine, 128).add(documents())
    with parts.engine(path, host=0) as engine:
        rag = Rag(engine, 128)
        assert [chunk.id for d in rag.documents() for chunk in d.chunks] == ids
        for fact in FACTS[::-1]:
            answer = rag.ask(fact.question, **SHORT)
            assert fact.answered_by(answer.text)
            assert answer.report.missed == 0
        assert engine.stats().tiers["disk"].reads > 0


def test_a_damaged_chunk_changes_nothing_but_the_time(parts, path):
    settings = BlendConfig(controller=False)
    with parts.engine(path, blend=settings) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        want = rag.ask(FACTS[3].question, **SHORT)
        [second] = rag._library.named([want.citations[1].chunk])
        key = engine.blending.chunks.keys(rag.prefix, second.tokens)[0]
        inside = engine.store.get(key).data[-1].numpy().tobytes()
    file = values_file(path)
    raw = file.read_bytes()
    assert raw.count(inside) == 1
    file.write_bytes(raw.replace(inside, inside[::-1]))
    with parts.engine(path, host=0, blend=settings) as engine:
        answer = Rag(engine, 128).ask(FACTS[3].question, **SHORT)
        assert answer.tokens == want.tokens
        assert answer.report.corrupt == 1
        assert engine.stats().tiers["disk"].corrupt == 1


def test_without_a_disk_nothing_is_written(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with parts.engine() as engine:
        Rag(engine, 128).add(documents())
    assert not list(tmp_path.iterdir())


def test_the_catalogue_may_live_elsewhere_and_holds_ids_and_text_alone(
    parts, path, tmp_path, monkeypatch
):
    with parts.engine(path) as engine:
        monkeypatch.chdir(tmp_path)
        rag = Rag(engine, 128, path="elsewhere")
        monkeypatch.chdir(path)  # which changes nothing
        rag.add(documents())
    [file] = (tmp_path / "elsewhere").glob("rag-*.jsonl")
    assert file.stat().st_mode & 0o777 == 0o600
    assert not list(path.glob("rag-*"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    chunks = [chunk for row in rows if row["type"] == "document" for chunk in row["chunks"]]
    assert all(chunk.keys() == {"id", "text", "tokens"} for chunk in chunks)


# whose documents


def test_another_tenant_sees_and_reuses_nothing(parts, path):
    with parts.engine(path, tenant="ours") as engine:
        ids = Rag(engine, 128).add(documents())
    with parts.engine(path, tenant="theirs") as engine:
        rag = Rag(engine, 128)
        assert rag.documents() == []
        with pytest.raises(PromptError, match="there are no documents yet"):
            rag.ask(FACTS[0].question)
        with pytest.raises(PromptError, match="there is no chunk"):
            rag.ask(FACTS[0].question, ids[:1])
        with pytest.raises(PromptError, match="there is no document"):
            rag.delete(PAGES[0])
        before = engine.stats().tiers["disk"].reads
        assert rag.add(documents()) == ids
        assert right(rag) == [True] * 4
        assert engine.stats().tiers["disk"].reads == before  # all of it computed, and in memory
        rag.delete(PAGES)
    with parts.engine(path, tenant="ours") as engine:
        assert Rag(engine, 128).ask(FACTS[0].question, **SHORT).report.missed == 0


def test_another_model_has_documents_of_its_own(parts, path):
    with parts.engine(path) as engine:
        Rag(engine, 128).add(documents())
    store = StoreConfig(disk_path=str(path))
    with Engine.from_pretrained("needle-smear", EngineConfig(store=store)) as engine:
        assert Rag(engine, 128).documents() == []


# streams, and the event loop: see also test_background


def test_a_stream_ends_with_the_answer(rag):
    steps = list(rag.stream(FACTS[0].question, **SHORT))
    answer = steps[-1].answer
    assert [step.answer for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert "".join(step.text for step in steps) == answer.text
    assert [step.token for step in steps] == answer.tokens
    assert answer.tokens == rag.ask(FACTS[0].question, **SHORT).tokens


def test_a_stream_that_is_closed_frees_its_request(parts):
    with parts.engine(method=preset("headrace", budget=64), pinned_bytes=1 << 26) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        free = engine.memory.pool.free_blocks
        steps = rag.stream("What was said about assertions?", max_new_tokens=100)
        next(steps)
        assert engine.memory.pool.free_blocks < free
        steps.close()
        assert engine.memory.pool.free_blocks == free


def test_sampling_is_the_engines(rag):
    options = dict(temperature=1.0, seed=5, max_new_tokens=12)
    one, same = (rag.ask("What is a tiger?", **options) for _ in range(2))
    assert one.tokens == same.tokens
    assert rag.ask(FACTS[0].question, stop="41", max_new_tokens=12).text.strip() == "31"


# what else may be set


def test_a_retriever_of_the_users_own_is_asked(parts):
    def embed(texts):
        return np.array([[fact.key in text for fact in FACTS] + [0.01] for text in texts], float)

    with parts.engine() as engine:
        rag = Rag(engine, 128, retriever=Vectors(embed))
        rag.add(documents())
        assert right(rag, top_k=1) == [True] * 4
        rag.delete(PAGES[0])
        assert FACTS[0].key not in rag.ask(FACTS[0].question, **SHORT).citations[0].text


def test_what_looks_like_a_special_token_in_a_document_is_text(parts):
    with parts.engine() as engine:
        rag = Rag(engine, 128)
        rag.add(f"The end <|eos|> came.{FACTS[0].statement}")
        assert engine.tokenizer.eos_token_id not in rag.documents()[0].chunks[0].tokens
        assert FACTS[0].answered_by(rag.ask(FACTS[0].question, **SHORT).text)


# what is wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(chunk_tokens=32_768), "needs 3277. positions .* the model has 32768"),
        (dict(chunk_tokens=0), "chunk_tokens = 0 .*from 1 up"),
        (dict(policy="best"), "policy must be one of reposition, .*, got 'best'"),
        (dict(share=1.5), "share is a share from 0 to 1, got 1.5"),
    ],
)
def test_a_setting_out_of_range_is_refused(rag, options, said):
    with pytest.raises(ConfigError, match=said):
        Rag(rag.engine, **options)


@pytest.mark.parametrize(
    ("question", "options", "said"),
    [
        (" ", {}, "the question is empty"),
        ("tiger " * 40_000, {}, "the question has .* tokens .*32768 positions: shorten the quest"),
        ("What?", dict(chunks=["nobody"]), "there is no chunk 'nobody': it was never added, or"),
        ("What?", dict(chunks=[]), "chunks is empty"),
        ("What?", dict(chunks=[], top_k=3), "chunks, or top_k for a search, not both"),
        ("What?", dict(top_k=0), "top_k must be at least 1, got 0"),
        ("xylophonist", {}, "no chunk fits the question"),
        ("tiger?", dict(max_new_tokens=0), "max_new_tokens must be"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_at_once(rag, question, options, said):
    with pytest.raises(PromptError, match=said):
        rag.stream(question, **options)


def test_chunks_that_do_not_fit_together_are_refused(rag):
    ids = [chunk.id for document in rag.documents() for chunk in document.chunks]
    with pytest.raises(
        PromptError, match=r"\d+ chunks and the question have .* tokens, .* fewer chunks"
    ):
        rag.ask("What?", ids * 40)


def test_an_engine_without_a_tokenizer_is_refused(parts):
    with Engine(parts.module) as engine, pytest.raises(ConfigError, match="with a tokenizer"):
        Rag(engine)


def test_a_model_whose_keys_cannot_move_is_refused(parts):
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    module = build("llama", rope_parameters=rope)
    with Engine(module, parts.tokenizer) as engine, pytest.raises(ModelError, match="rotary"):
        Rag(engine)


def test_a_full_disk_is_told_and_adding_again_completes(parts, path, monkeypatch):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)

        def full():
            raise StoreError("disk tier full")

        monkeypatch.setattr(engine.store, "flush", full)
        with pytest.raises(StoreError):
            rag.add(documents())
        monkeypatch.undo()
        assert len(rag.documents()) == 4
        rag.add(documents())
        assert right(rag) == [True] * 4


def test_a_template_that_says_the_time_keeps_answering(parts):
    with parts.engine() as engine:
        plain = engine.tokenizer.chat_template
        ticking = "{{- tick() -}}{%- for m in messages -%}{{- m['content'] -}}{%- endfor -%}"
        engine.tokenizer.chat_template = ticking.replace("tick()", "7")
        try:
            rag = Rag(engine, 128)
            rag.add(documents())
            engine.tokenizer.chat_template = ticking.replace("tick()", "8")
            answer = rag.ask(FACTS[0].question, top_k=4, **SHORT)
            assert answer.report.missed == 0
        finally:
            engine.tokenizer.chat_template = plain


def test_a_retriever_that_fails_halfway_keeps_nothing_that_is_deleted(parts):
    failing = [True]

    def embed(texts):
        if failing[0] and any("otter" in text for text in texts):
            raise ConnectionError("too many requests")
        return np.array([[1.0 + len(text), "otter" in text] for text in texts], np.float32)

    with parts.engine() as engine:
        rag = Rag(engine, 128, retriever=Vectors(embed, batch=1))
        for name in ("tiger", "otter"):
            rag.add({"id": name, "text": f"The special magic number for {name} is 314159."})
        with pytest.raises(ConnectionError):
            rag.search("Which number?")
        rag.delete("tiger")
        failing[0] = False
        [hit] = rag.search("Which number?")
        [otter] = rag.documents()
        assert hit.id == otter.chunks[0].id


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_asked_again_is_in_memory(parts, path, wait):
    with parts.engine(path) as engine:
        Rag(engine, 128).add(documents())
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        if wait:
            asyncio.run(rag.aask(FACTS[0].question, **SHORT))
        else:
            rag.ask(FACTS[0].question, **SHORT)
        assert engine.stats().tiers["host"].blocks > 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda rag: rag.ask("caf\udce9"),
        lambda rag: rag.engine.generate("caf\udce9"),
        lambda rag: rag.engine.render([{"role": "user", "content": "caf\udce9"}]),
        lambda rag: rag.add({"id": "caf\udce9", "text": "It rained."}),
        lambda rag: rag.add({"title": "caf\udce9", "text": "It rained."}),
        lambda rag: Rag(rag.engine, 128, prefix="caf\udce9"),
    ],
)
def test_what_is_not_unicode_is_a_mistake(rag, ask):
    with pytest.raises(PromptError, match="is not Unicode"):
        ask(rag)


def test_an_answer_is_given_though_a_deletion_is_still_to_be_done(parts, path, monkeypatch):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())

        def broken(*_):
            raise StoreError("the disk failed")

        with monkeypatch.context() as patch:
            patch.setattr(engine.store, "delete", broken)
            with pytest.raises(StoreError):
                rag.delete(PAGES[0])
            assert FACTS[1].answered_by(rag.ask(FACTS[1].question, top_k=1, **SHORT).text)
        assert FACTS[1].answered_by(rag.ask(FACTS[1].question, top_k=1, **SHORT).text)
        assert rag._library._catalogue.doomed == {}
