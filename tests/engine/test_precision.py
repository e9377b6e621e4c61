"""A request for exact KV never gets any that was stored with a loss, nor any computed on it."""

from contextlib import closing

import pytest
import torch

from engine import BlendConfig, Engine, EngineConfig
from engine.rag import Rag
from engine.sampling import Sampling
from engine.service.ask import Ask
from engine.service.service import Service
from kvstore.block import Kind, Precision
from kvstore.config import StoreConfig
from tests.engine import oracle
from tests.engine.blend.requests import segments
from tests.engine.families import build, prompt
from tests.engine.rag.corpus import FACTS, PAGES, Parts, documents
from tests.kvstore.make import same

LOSSY = ("fp8", "int8", "k8v4", "int4")
KEEPING = BlendConfig(controller=False, keep_repaired=True)


@pytest.fixture(scope="module")
def module():
    return build("llama")


def engine_on(module, folder, codec):
    store = StoreConfig(host_bytes=0, disk_path=str(folder), disk_bytes=1 << 26, codec=codec)
    return Engine(module, config=EngineConfig(block_tokens=16, prefill_chunk=64, store=store))


def cached(done):
    return done[0].stats.cached_tokens


def entries(engine):
    """Of every block on the disk."""
    engine.store.flush()
    disk = engine.store._levels[0].tier
    with disk.access.reading() as txn:
        return list(disk.access.ledger.entries(txn))


def written(engine):
    return {(entry.key.precision, entry.codec.name) for entry in entries(engine)}


@pytest.mark.parametrize("codec", LOSSY)
def test_an_exact_request_finds_nothing_that_lost_something(module, tmp_path, codec):
    asked = prompt(100).tolist()
    precision = StoreConfig(codec=codec).precision
    with engine_on(module, tmp_path, codec) as engine:
        engine.generate(asked, max_new_tokens=40)  # blocks of prompt and answer
        assert written(engine) == {(precision, codec)}
        again = engine.generate(asked, max_new_tokens=40)
        assert cached(again) == 96
        exact = engine.generate(asked, max_new_tokens=40, exact=True)
        assert cached(exact) == 0
        wanted = oracle.generate(module, [torch.tensor(asked)], 40)[0]
        oracle.assert_same_answer(module, torch.tensor(asked), exact[0].tokens, wanted)
        assert written(engine) == {(precision, codec), (Precision.EXACT, "lossless")}
        once_more = engine.generate(asked, max_new_tokens=40, exact=True)
        assert (cached(once_more), once_more[0].tokens) == (96, exact[0].tokens)


def test_what_is_computed_on_lossy_kv_is_not_exact_either(module, tmp_path):
    """A prompt that goes on where a lossy one ended: its new blocks rest on lossy ones."""
    long = prompt(129).tolist()
    short = long[:65]
    with engine_on(module, tmp_path, "int4") as engine:
        engine.generate(short, max_new_tokens=1)
        engine.store.flush()
        assert cached(engine.generate(long, max_new_tokens=1)) == 64
        engine.store.flush()
        exact = engine.plain.keys(long, precision=Precision.EXACT)
        assert engine.store.lookup(exact) == 0
        assert engine.store.lookup(engine.plain.keys(long)) == 8
        assert cached(engine.generate(long, max_new_tokens=1, exact=True)) == 0
        wanted = engine.logits(long)[-1]
        run = engine.accept(long, 1, Sampling(), exact=True)
        torch.testing.assert_close(engine.plain.prefill(run), wanted, rtol=0, atol=1e-4)
        run.release()


def test_exact_kv_survives_a_restart_bit_for_bit_whatever_codec_is_set(module, tmp_path):
    asked = prompt(81).tolist()
    with engine_on(module, tmp_path, "raw") as engine:
        engine.generate(asked, max_new_tokens=1)
        keys = engine.plain.keys(asked)
        engine.store.flush()
        first = [engine.store.get(key).data for key in keys]
    for codec in ("lossless", "int8"):
        with engine_on(module, tmp_path, codec) as engine:
            assert cached(engine.generate(asked, max_new_tokens=1, exact=True)) == 80
            assert all(same(engine.store.get(k).data, data) for k, data in zip(keys, first))


@pytest.mark.parametrize("codec", ["int8", "lossless"])
def test_chunks_and_what_repairs_them_are_named_by_precision(module, tmp_path, codec):
    asked = segments()
    lossy = StoreConfig(codec=codec).precision
    with engine_on(module, tmp_path, codec) as engine:
        engine.precompute(asked.chunks, asked.prefix)
        first = engine.generate(asked, max_new_tokens=4, blend=KEEPING)[0]
        assert first.stats.blend.missed == 0
        engine.store.flush()
        again = engine.generate(asked, max_new_tokens=4, blend=KEEPING)[0]
        assert again.stats.blend.repaired_tokens > 0
        engine.store.flush()
        exact = engine.generate(asked, max_new_tokens=4, blend=KEEPING, exact=True)[0]
        if lossy is Precision.EXACT:
            assert exact.stats.blend.repaired_tokens == again.stats.blend.repaired_tokens
            return
        assert (exact.stats.blend.missed, exact.stats.blend.repaired_tokens) == (4, 0)
        assert {precision for precision, _ in written(engine)} == {lossy, Precision.EXACT}


def test_what_a_blend_makes_never_answers_for_exact_kv(module, tmp_path):
    asked = segments()
    with engine_on(module, tmp_path, "int8") as engine:
        for exact in (False, True):
            engine.generate(asked, max_new_tokens=40, blend=KEEPING, exact=exact)
            engine.store.flush()
        for precision in Precision:
            keys = engine.plain.keys(asked.tokens, precision=precision)
            assert engine.store.lookup(keys) == 0, precision
        assert cached(engine.generate(list(asked.tokens), max_new_tokens=1, exact=True)) == 0


def test_a_service_passes_the_demand_on(module, tmp_path, monkeypatch):
    asked = prompt(65).tolist()
    with engine_on(module, tmp_path, "int8") as engine:
        seen, accept = [], engine.accept

        def noted(*args, **named):
            seen.append(accept(*args, **named))
            return seen[-1]

        monkeypatch.setattr(engine, "accept", noted)
        with closing(Service(engine)) as service:
            for exact in (False, True):
                service.submit(Ask(prompt=asked, max_new_tokens=1, exact=exact), lambda event: None)
            assert service.drain(60.0)
    assert [run.precision for run in seen] == [Precision.INT8, Precision.EXACT]


@pytest.mark.parametrize("later", ["int8", "raw"])
def test_a_deleted_document_leaves_no_kv_whatever_codec_was_set(tmp_path, later):
    """Neither of its chunks nor of prompts that rest on them."""
    parts = Parts()

    def opened(codec):
        store = StoreConfig(host_bytes=0, disk_path=str(tmp_path), codec=codec)
        config = EngineConfig(store=store, blend=BlendConfig(controller=False))
        return Engine(parts.module, parts.tokenizer, config)

    with opened("int8") as engine:
        rag = Rag(engine, 128)
        rag.add(documents()[:1])
        whole = rag.ask(FACTS[0].question, max_new_tokens=1)
        assert whole.report.chunks
        assert {name for _, name in written(engine)} == {"int8"}
    with opened(later) as engine:
        Rag(engine, 128).delete(PAGES[0])
        chunks = {entry.key.kind for entry in entries(engine)} & {Kind.CHUNK}
        assert not chunks
