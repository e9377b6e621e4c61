"""What the server's loop leaves to threads: it would hold up all other clients."""

import asyncio
import json
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest

from engine.engine import Engine
from engine.serve import documents, generate, pages
from engine.serve.config import KeyConfig
from engine.service.stats import ServiceStats
from engine.slices import Slices, drained
from tests.engine.serve.scripted import Scripted
from tests.engine.serve.server import LIMIT_S, Running, running

ASKED = {"model": "needle-tiny", "prompt": [5, 6, 7], "max_tokens": 100}


def on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Watched(Scripted):
    """Notes which of its doors were opened, and whether the loop stood before them."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.opened: Queue[tuple[str, bool]] = Queue()

    def stats(self) -> ServiceStats:
        self.opened.put(("stats", on_loop()))
        return super().stats()

    def background(self, job: Callable[[], Slices[Any]], owner: str = "") -> "Future[Any]":
        self.opened.put(("background", on_loop()))
        return super().background(job, owner)


class Queued(Scripted):
    """Its chores wait until a test takes them."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.chores: Queue[tuple[Callable[[], Slices[Any]], str, Future[Any]]] = Queue()

    def background(self, job: Callable[[], Slices[Any]], owner: str = "") -> "Future[Any]":
        future: Future[Any] = Future()
        self.chores.put((job, owner, future))
        return future


@pytest.fixture(scope="module")
def server():
    with running(make=Watched) as made:
        yield made


@pytest.fixture
def opened(server):
    """The doors from now on."""
    found: Queue[tuple[str, bool]] = Queue()
    server.service.opened = found
    return found


def watch(monkeypatch, module: Any, name: str, instead: Any = None) -> list[bool]:
    """Whether the loop called a function, for each call.

    Args:
        instead: is called in its place.
    """
    seen, given = [], instead or getattr(module, name)

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(on_loop())
        return given(*args, **options)

    monkeypatch.setattr(module, name, watched)
    return seen


def answered(server: Running, path: str = "completions", **asked: Any) -> int:
    with server.http() as client, ThreadPoolExecutor(1) as threads:
        done = threads.submit(client.post, f"/v1/{path}", json=ASKED | asked)
        server.service.next().end("done")
        return done.result(LIMIT_S).status_code


@pytest.mark.parametrize("path", ["/stats", "/metrics"])
def test_numbers_are_read_in_a_thread(server, opened, path):
    with server.http() as client:
        assert client.get(path).status_code == 200
    assert opened.get(timeout=LIMIT_S) == ("stats", False)


def test_traces_are_shown_by_a_thread(server, monkeypatch):
    seen = watch(monkeypatch, pages, "visible")
    with server.http() as client:
        for form in ({}, {"format": "otlp"}):
            assert client.get("/traces", params=form).status_code == 200
    assert seen == [False, False]


def test_a_request_that_ends_has_numbers_noted_by_a_thread(server, opened, monkeypatch):
    monkeypatch.setattr("engine.serve.history.PERIOD_S", 0.0)
    assert answered(server) == 200
    assert opened.get(timeout=LIMIT_S) == ("stats", False)


def test_documents_are_handed_over_and_listed_by_a_thread(server, opened, monkeypatch):
    parsed = watch(monkeypatch, documents, "parse_documents")
    listed = watch(monkeypatch, documents, "page_of")
    with server.http() as client:
        for text in ("One.", "Two, " * 20_000):
            given = {"documents": [{"text": text, "id": "d"}]}
            assert client.post("/v1/documents", json=given).status_code == 200
            assert opened.get(timeout=LIMIT_S) == ("background", False)
        assert len(client.get("/v1/documents").json()["data"]) == 1
        assert client.delete("/v1/documents/d").status_code == 200
    assert (parsed, listed) == ([True, False], [False])


@pytest.mark.parametrize(
    ("path", "name", "asked"),
    [
        ("completions", "parse_completion", {"prompt": [55] * 30_000}),
        (
            "chat/completions",
            "parse_chat",
            {
                "prompt": ...,
                "messages": [{"role": "user", "content": "x " * 16_000 + " " * 40_000}],
            },
        ),
    ],
)
def test_a_large_body_is_read_by_a_thread(server, monkeypatch, path, name, asked):
    seen = watch(monkeypatch, generate, name)
    body = {key: value for key, value in (ASKED | asked).items() if value is not ...}
    with server.http() as client, ThreadPoolExecutor(1) as threads:
        done = threads.submit(client.post, f"/v1/{path}", json=body)
        server.service.next().end("done")
        assert done.result(LIMIT_S).status_code == 200
    assert seen == [False]


def test_an_answer_with_probabilities_is_made_by_a_thread(server, monkeypatch):
    seen = watch(monkeypatch, generate, "body_of", instead=lambda *_: b"{}")
    assert answered(server) == answered(server, logprobs=2) == 200
    assert seen == [True, False]


def test_who_leaves_has_its_place_until_its_chore_is_off_the_queue(monkeypatch):
    def never(*args: object) -> Slices[None]:
        raise AssertionError("a chore nobody waits for was begun")

    monkeypatch.setattr(Engine, "precompute_slices", never)
    keys = {"one": KeyConfig(key="one", max_concurrent=1)}
    with running(make=Queued, keys=keys) as server, server.http("one") as client:
        body = json.dumps({"documents": [{"text": "One."}]}).encode()
        head = (
            b"POST /v1/documents HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer one\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
            connection.sendall(head + body)
            job, owner, future = server.service.chores.get(timeout=LIMIT_S)
            assert owner == "one"
        assert server.ended(outcome="gone")["status"] == 499
        assert client.post("/v1/completions", json=ASKED).status_code == 429
        future.set_result(drained(job()))
        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(client.post, "/v1/completions", json=ASKED)
            server.service.next().end("fine")
            assert done.result(LIMIT_S).status_code == 200
