"""A deleted document is gone: its text, its chunks' KV, and the prompts that rested on them."""

import threading
from copy import deepcopy

import pytest
from tokenizers.normalizers import NFD, Sequence, StripAccents

from engine import BlendConfig, Engine, EngineConfig, PromptError
from engine.perfmodel import Decision
from engine.rag import Rag
from engine.rag import forget as module
from engine.rag.catalogue import Catalogue
from engine.rag.library import catalogue_file
from kvstore.config import StoreConfig
from kvstore.errors import StoreError
from tests.engine.rag.corpus import FACTS, PAGES, Parts, blocks, documents

SHORT = dict(max_new_tokens=8)
ALWAYS_LOAD = BlendConfig(controller=False)


@pytest.fixture(scope="module")
def parts():
    return Parts()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def compute_everything(engine, monkeypatch):
    """As if loading were always slower: prompts are computed whole, and stored."""
    chosen = Decision(False, 1.0, "compute: for this test")
    monkeypatch.setattr(engine.blending.speeds, "decide", lambda work: chosen)


def keys(rag, document):
    """Of a document's chunks."""
    [found] = [d for d in rag.documents() if d.id == document]
    name = rag.engine.blending.chunks.keys
    return [key for chunk in found.chunks for key in name(rag.prefix, chunk.tokens)]


def test_a_deleted_document_leaves_neither_text_nor_kv(parts, path):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        gone, kept = keys(rag, PAGES[0]), keys(rag, PAGES[1])
        chunks = [chunk.id for chunk in rag.documents()[0].chunks]
        assert rag.delete(PAGES[0]) == len(chunks)
        assert not any(key in engine.store for key in gone)
        assert all(key in engine.store for key in kept)
        assert [d.id for d in rag.documents()] == list(PAGES[1:])
        with pytest.raises(PromptError, match="its documents are deleted"):
            rag.ask(FACTS[0].question, chunks)
        assert all(hit.id not in chunks for hit in rag.search(FACTS[0].question, 9))
        assert FACTS[1].answered_by(rag.ask(FACTS[1].question, **SHORT).text)
    left = b"".join(file.read_bytes() for file in path.glob("rag-*"))
    assert FACTS[0].value.encode() not in left
    assert FACTS[1].value.encode() in left
    with parts.engine(path) as engine:
        assert not any(key in engine.store for key in gone)


def test_a_chunk_that_another_document_has_stays(parts, path):
    same = documents()[0]
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add([same, same | {"id": "copy"}])
        chunk_keys = keys(rag, PAGES[0])
        assert rag.delete(PAGES[0]) == 0
        assert all(key in engine.store for key in chunk_keys)
        assert rag.ask(FACTS[0].question, **SHORT).citations[0].documents == ("copy",)
        assert rag.delete("copy") > 0
        assert blocks(engine) == {0}


def test_a_chunk_that_stays_is_in_the_words_of_those_who_have_it(parts, path):
    plain = deepcopy(parts.tokenizer)
    plain.backend_tokenizer.normalizer = Sequence([NFD(), StripAccents()])
    store = StoreConfig(disk_path=str(path))
    with Engine(parts.module, plain, EngineConfig(store=store)) as engine:
        rag = Rag(engine, 128)
        texts = {"ours": "The name is Ros\u00e9.", "theirs": "The name is Rose."}
        rag.add([{"id": id_, "title": text, "text": text} for id_, text in texts.items()])
        assert len(rag.search("Ros\u00e9", 1)) == 1
        rag.delete("ours")
        assert rag.search("Ros\u00e9", 1) == []
        [cited] = rag.ask("Rose", max_new_tokens=1).citations
        assert (cited.text, cited.title) == (texts["theirs"], texts["theirs"])


def test_an_unknown_document_is_refused_and_nothing_is_deleted(parts):
    with parts.engine() as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        with pytest.raises(PromptError, match="there is no document 'nobody': nothing was deleted"):
            rag.delete([PAGES[0], "nobody"])
        assert len(rag.documents()) == 4


def test_a_document_that_changes_loses_its_old_text_and_kv(parts, path):
    first, *others = documents()
    changed = first | {"text": first["text"].replace(FACTS[0].value, "555555")}
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add([first, *others])
        before = set(keys(rag, PAGES[0]))
        rag.add(changed)
        assert rag.ask(FACTS[0].question, **SHORT).text.strip() == "555555."
        gone = before - set(keys(rag, PAGES[0]))
        assert gone
        assert not any(key in engine.store for key in gone)
    assert FACTS[0].value.encode() not in b"".join(f.read_bytes() for f in path.glob("rag-*"))


def test_kv_behind_other_instructions_and_in_other_blocks_goes_too(parts, path):
    for settings in (dict(block_tokens=64), dict(block_tokens=32)):
        with parts.engine(path, **settings) as engine:
            for prefix in ("Answer.", "Say a number."):
                Rag(engine, 128, prefix=prefix).add(documents()[:1])
    with parts.engine(path, block_tokens=16) as engine:
        assert blocks(engine) != {0}
        Rag(engine, 128).delete(PAGES[0])
        assert blocks(engine) == {0}


@pytest.mark.parametrize("chosen", [(0, 1, 2), (1, 0), (0,)])
def test_prompts_that_were_computed_whole_go_too(parts, path, monkeypatch, chosen):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128, prefix="Answer with a number.")
        rag.add(documents())
        firsts = [document.chunks[0].id for document in rag.documents()]
        compute_everything(engine, monkeypatch)
        blending = engine.blending
        monkeypatch.setattr(blending, "_lossless", lambda found: blending.speeds.decide(found))
        ids = [firsts[number] for number in chosen]
        answer = rag.ask(FACTS[1].question, ids, max_new_tokens=40)
        assert not answer.report.loaded
        segments = rag._segments(rag._library.named(ids), rag._behind(FACTS[1].question))
        prompt = rag._library._forgetting._keys([*segments.tokens, *answer.tokens], 64)
        assert sum(key in engine.store for key in prompt) > 1
        rag.delete(PAGES[chosen[-1]])
        left = sum(key in engine.store for key in prompt)
        assert left == segments.spans[-1].start // 64
        rag.delete([d.id for d in rag.documents()])
        assert blocks(engine) <= {0, 1}  # the instructions alone are of no document


def test_a_cancelled_request_leaves_nothing_of_a_deleted_document(parts, path, monkeypatch):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        compute_everything(engine, monkeypatch)
        steps = rag.stream(FACTS[0].question, max_new_tokens=40)
        next(steps)
        steps.close()
        rag.delete(PAGES)
        assert blocks(engine) == {0}


def test_a_cancelled_request_whose_chunks_were_reordered_leaves_nothing(parts, path, monkeypatch):
    with parts.engine(path, block_tokens=16, blend=BlendConfig(reorder=True)) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        compute_everything(engine, monkeypatch)
        blending = engine.blending
        monkeypatch.setattr(blending, "_lossless", lambda found: blending.speeds.decide(found))
        first, second, third, last = (document.chunks[0].id for document in rag.documents())
        rag.ask(FACTS[0].question, [third, second], **SHORT)
        steps = rag.stream(FACTS[0].question, [last, first, second, third], max_new_tokens=40)
        next(steps)
        steps.close()
        read = rag.prompt(FACTS[0].question, [third, second, last, first])
        keys = engine.plain.keys(read.tokens)
        assert all(key in engine.store for key in keys)
        rag.delete(PAGES[3])
        assert sum(key in engine.store for key in keys) == read.spans[2].start // 16
        rag.delete([document.id for document in rag.documents()])
        assert blocks(engine) == {0}


@pytest.mark.parametrize("compute", [False, True])
def test_what_a_request_stores_after_the_deletion_goes_when_it_ends(
    parts, path, monkeypatch, compute
):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        if compute:
            compute_everything(engine, monkeypatch)
        steps = rag.stream(FACTS[0].question, max_new_tokens=40)
        engine.store.flush()
        rag.delete(PAGES)  # before the request computes anything
        assert blocks(engine) == {0}
        list(steps)
        assert blocks(engine) == {0}


def test_a_document_deleted_while_it_is_added_leaves_nothing(parts, path):
    with parts.engine(path) as engine:
        rag, other = Rag(engine, 128), Rag(engine, 128)

        def progress(done, of):
            if done == 2:
                thread = threading.Thread(target=other.delete, args=(PAGES[0],))
                thread.start()
                thread.join()

        rag.add(documents()[0], progress=progress)
        assert rag.documents() == []
        assert blocks(engine) == {0}


def test_a_document_that_comes_again_while_it_is_deleted_can_be_deleted_again(
    parts, path, monkeypatch
):
    with parts.engine(path) as engine:
        rag, other = Rag(engine, 128), Rag(engine, 128)
        rag.add(documents()[0])
        compute_everything(engine, monkeypatch)
        rag.ask(FACTS[0].question, **SHORT)
        delete = engine.store.delete

        def come_again(names):
            monkeypatch.setattr(engine.store, "delete", delete)
            delete(names)
            other.add(documents()[0])
            other.ask(FACTS[0].question, **SHORT)

        monkeypatch.setattr(engine.store, "delete", come_again)
        rag.delete(PAGES[0])
        assert blocks(engine) != {0}
        rag.delete(PAGES[0])
        assert blocks(engine) == {0}


def test_a_deletion_that_was_interrupted_is_finished_by_the_next_process(parts, path, monkeypatch):
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())

        def fail(names):
            raise StoreError("the power went")

        monkeypatch.setattr(engine.store, "delete", fail)
        with pytest.raises(StoreError):
            rag.delete(PAGES)
        monkeypatch.undo()
        assert blocks(engine) != {0}
    with parts.engine(path) as engine:
        Rag(engine, 128)
        assert blocks(engine) == {0}
        assert not Catalogue(catalogue_file(engine, None)).doomed


def test_traces_of_evicted_prompts_are_forgotten(parts, path, monkeypatch):
    monkeypatch.setattr(module, "TRACES", 2)
    with parts.engine(path) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        compute_everything(engine, monkeypatch)
        for fact in FACTS:
            rag.ask(fact.question, **SHORT)
        engine.store.clear()
        assert Catalogue(catalogue_file(engine, None)).traces
        Rag(engine, 128)
        assert not Catalogue(catalogue_file(engine, None)).traces


def test_blended_prompts_leave_no_traces(parts, path):
    with parts.engine(path, blend=ALWAYS_LOAD) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        before = blocks(engine)
        rag.ask(FACTS[0].question, **SHORT)
        assert not Catalogue(catalogue_file(engine, None)).traces
        assert blocks(engine) == before


def test_nothing_repaired_is_kept_where_nobody_could_delete_it(parts, path):
    settings = BlendConfig(keep_repaired=True, controller=False)
    with parts.engine(path, blend=settings) as engine:
        rag = Rag(engine, 128)
        rag.add(documents())
        rag.ask(FACTS[0].question, **SHORT)
        rag.delete(PAGES)
        assert blocks(engine) == {0}
