"""Threads that read long texts, and clients that do not wait for them. The service is scripted."""

import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.engine import Engine
from engine.rag.catalogue import Document
from engine.rag.documents import Source
from engine.rag.shelf import Shelf
from engine.serve.config import KeyConfig
from engine.serve.desk import READERS, THREADS
from engine.serve.limits import Place
from engine.serve.token_text import longest
from tests.engine.serve.scripted import Scripted
from tests.engine.serve.server import LIMIT_S, running

ASKED = {"model": "needle-tiny", "prompt": [5, 6, 7], "max_tokens": 100}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


def test_who_leaves_keeps_its_place_until_no_thread_works_for_it(monkeypatch):
    reads, goes_on, freed = threading.Event(), threading.Event(), threading.Semaphore(0)
    free = Place._free

    def noted(place: Place) -> None:
        free(place)
        if place._over and not place._working:
            freed.release()

    def slow(engine: Engine, text: str) -> list[int]:
        reads.set()
        assert goes_on.wait(LIMIT_S)
        return [5]

    monkeypatch.setattr(Place, "_free", noted)
    monkeypatch.setattr(Engine, "tokenize", slow)
    keys = {"one": KeyConfig(key="one", max_concurrent=1)}
    with running(make=Scripted, keys=keys) as server, server.http("one") as client:
        try:
            body = json.dumps(ASKED | {"prompt": "a"}).encode()
            head = HEAD + b"authorization: Bearer one\r\ncontent-length: %d\r\n\r\n" % len(body)
            with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
                connection.sendall(head + body)
                assert reads.wait(LIMIT_S)
            assert server.ended(outcome="gone")["status"] == 499
            assert client.post("/v1/completions", json=ASKED).status_code == 429
        finally:
            goes_on.set()
        server.service.next()  # that of who left, which is cancelled at once
        server.service.cancelled.get(timeout=LIMIT_S)
        for _ in ("refused", "left"):
            assert freed.acquire(timeout=LIMIT_S)
        with ThreadPoolExecutor() as threads:
            done = threads.submit(client.post, "/v1/completions", json=ASKED)
            server.service.next().end("fine")
            assert done.result(LIMIT_S).status_code == 200


def test_a_request_is_cancelled_while_all_threads_read_long_texts(monkeypatch):
    """Cancelling, deleting and what is noted do not wait for them."""
    goes_on, reading = threading.Event(), threading.Semaphore(0)

    def slow(engine: Engine, text: str) -> list[int]:
        reading.release()
        assert goes_on.wait(LIMIT_S)
        return [5]

    with (
        running(make=Scripted, wait_s=0.1) as server,
        server.http() as client,
        ThreadPoolExecutor(8) as threads,
    ):
        with client.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as answer:
            submitted = server.service.next()
            submitted.say("one")
            assert answer.status_code == 200
            monkeypatch.setattr(Engine, "tokenize", slow)
            asked = {"json": ASKED | {"prompt": "a"}}
            others = [threads.submit(client.post, "/v1/completions", **asked) for _ in range(8)]
            try:
                for _ in range(THREADS):
                    assert reading.acquire(timeout=LIMIT_S)
                answer.close()
                assert server.service.cancelled.get(timeout=LIMIT_S) == submitted.ticket
            finally:
                goes_on.set()
        for _ in others:
            server.service.next().end("done")
        assert all(other.result(LIMIT_S).status_code == 200 for other in others)


def test_prompts_do_not_wait_for_documents_that_are_read(monkeypatch):
    goes_on, reading, read = threading.Event(), threading.Semaphore(0), Shelf.read

    def slow(shelf: Shelf, sources: Sequence[Source]) -> list[Document]:
        reading.release()
        assert goes_on.wait(LIMIT_S)
        return read(shelf, sources)

    monkeypatch.setattr(Shelf, "read", slow)
    with (
        running(make=Scripted) as server,
        server.http() as client,
        ThreadPoolExecutor(8) as threads,
    ):
        given = {"json": {"documents": [{"text": "A text."}]}}
        adding = [threads.submit(client.post, "/v1/documents", **given) for _ in range(THREADS + 1)]
        try:
            for _ in range(READERS):
                assert reading.acquire(timeout=LIMIT_S)
            asked = threads.submit(client.post, "/v1/completions", json=ASKED | {"prompt": "a"})
            server.service.next().end("done")
            assert asked.result(LIMIT_S).status_code == 200
        finally:
            goes_on.set()
        assert all(one.result(LIMIT_S).status_code == 200 for one in adding)


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(monkeypatch):
    def never(engine: Engine, given: object) -> list[int]:
        raise AssertionError("it was read")

    monkeypatch.setattr(Engine, "tokenize", never)
    monkeypatch.setattr(Engine, "render", never)
    with running(make=Scripted, max_prompt_tokens=10) as server, server.http() as client:
        text = "x" * (10 * (longest(server.engine.tokenizer) or 0) + 1)
        chat = {"model": server.model, "messages": [{"role": "user", "content": text}]}
        documents = chat | {
            "messages": [{"role": "user", "content": "?"}], "documents": [{"text": text}],
        }  # fmt: skip
        for path, asked in [
            ("completions", ASKED | {"prompt": text}),
            ("chat/completions", chat),
            ("chat/completions", documents),
        ]:
            answer = client.post(f"/v1/{path}", json=asked)
            assert answer.status_code == 400, asked
            assert answer.json()["error"]["code"] == "context_length_exceeded"
