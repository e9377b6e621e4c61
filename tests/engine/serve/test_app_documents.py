"""Documents over HTTP, from their adding to their end."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from engine.blend.repair import BlendConfig
from engine.rag.catalogue import Catalogue, CatalogueError, Document
from engine.rag.shelf import Reading, Shelf
from engine.serve.config import KeyConfig
from engine.serve.desk import THREADS
from kvstore.config import StoreConfig
from kvstore.errors import StoreError
from tests.engine.rag.corpus import FACTS, blocks, documents
from tests.engine.serve.server import LIMIT_S, Running, running

FIRST, SECOND = FACTS[0], FACTS[1]


@pytest.fixture(scope="module")
def server():
    """What was stored is loaded, also where that happens to be slower than computing it."""
    with running(engine={"blend": BlendConfig(controller=False)}) as made:
        yield made


@pytest.fixture
def added(server):
    """All documents with facts; their ids."""
    given = documents()
    with server.http() as client:
        answer = client.post("/v1/documents", json={"documents": given})
        assert answer.status_code == 200, answer.text
        yield [document["id"] for document in given]
        for document in client.get("/v1/documents").json()["data"]:
            assert client.delete(f"/v1/documents/{document['id']}").status_code == 200


def ask(server: Running, question: str, ids: list[object], **options: object) -> tuple[str, int]:
    """The answer, and how many tokens of its prompt had KV."""
    messages = [{"role": "user", "content": question}]
    with server.client() as client:
        done = client.chat.completions.create(
            model=server.model,
            messages=options.pop("messages", messages),
            max_tokens=8,
            temperature=0,
            extra_body={"documents": ids} | options,
        )
    return str(done.choices[0].message.content).strip(
        " ."
    ), done.usage.prompt_tokens_details.cached_tokens


def test_documents_are_listed_and_shown(server, added):
    with server.http() as client:
        listed = client.get("/v1/documents").json()
        assert [one["id"] for one in listed["data"]] == added
        assert listed["has_more"] is False
        page = client.get("/v1/documents", params={"limit": 2, "after": added[0]}).json()
        assert [one["id"] for one in page["data"]] == added[1:3]
        assert page["has_more"] is True
        one = client.get(f"/v1/documents/{added[1]}").json()
        assert one == listed["data"][1]
        assert one["tokens"] > 100
        assert len(one["chunks"]) >= 1


def test_a_chat_reads_documents_in_any_order_with_their_kv(server, added):
    for ids in (added, added[::-1]):
        for fact in (FIRST, SECOND):
            answer, cached = ask(server, fact.question, ids)
            assert answer == fact.value
            assert cached > 300


def test_a_chunk_is_read_alone(server, added):
    with server.http() as client:
        [chunk] = client.get(f"/v1/documents/{added[1]}").json()["chunks"]
    assert ask(server, SECOND.question, [chunk])[0] == SECOND.value


def test_a_text_may_come_with_the_question(server, added):
    inline = {"text": documents()[1]["text"], "title": "On del"}
    assert ask(server, SECOND.question, [added[0], inline])[0] == SECOND.value
    assert ask(server, FIRST.question, [added[0], inline])[0] == FIRST.value
    with server.http() as client:
        assert len(client.get("/v1/documents").json()["data"]) == len(added)


def test_a_text_that_came_with_a_question_has_kv_the_next_time(server):
    inline = {"text": "The secret number of Oslo is 662607. " * 20}
    question = "What is the secret number of Oslo?"
    assert ask(server, question, [inline])[0] == "662607"
    answer, cached = ask(server, question, [inline])
    assert answer == "662607"
    assert cached > 100


def test_a_conversation_goes_on_behind_its_documents(server, added):
    messages = [
        {"role": "system", "content": "Answer from the texts."},
        {"role": "user", "content": "What do you have?"},
        {"role": "assistant", "content": "Four texts."},
        {"role": "user", "content": SECOND.question},
    ]
    assert ask(server, "", added, messages=messages)[0] == SECOND.value
    answer, cached = ask(server, "", added, messages=messages)
    assert answer == SECOND.value
    assert cached > 300  # behind these instructions, too


def test_a_policy_and_a_share_may_be_asked_for(server, added):
    blend = {"policy": "boundary", "share": 1.0}
    assert ask(server, SECOND.question, added, blend=blend)[0] == SECOND.value
    with pytest.raises(openai.BadRequestError, match="blend"):
        ask(server, SECOND.question, added, blend={"share": 2})


def test_the_same_document_again_changes_nothing(server, added):
    held = blocks(server.engine)
    with server.http() as client:
        client.post("/v1/documents", json={"documents": documents()[:1]})
        assert len(client.get("/v1/documents").json()["data"]) == len(added)
    assert blocks(server.engine) == held


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"documents": []}, 400),
        ({"documents": [{"text": " \n"}]}, 400),
        ({"documents": [{"text": "a", "title": "long " * 400}]}, 400),
        ({"documents": [{"text": "a", "id": "x/y"}]}, 400),
        ({"documents": [{"text": "a", "id": "x"}, {"text": "b", "id": "x"}]}, 400),
        ({}, 400),
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_is_added(server, wrong, status):
    with server.http() as client:
        answer = client.post("/v1/documents", json=wrong)
        assert answer.status_code == status, answer.text
        assert client.get("/v1/documents").json()["data"] == []


def test_a_chat_without_a_question_for_its_documents_is_refused(server, added):
    with pytest.raises(openai.BadRequestError, match="a user says"):
        ask(server, "", added, messages=[{"role": "system", "content": "Be."}])
    with pytest.raises(openai.NotFoundError):
        ask(server, SECOND.question, [added[0], "none"])


def test_deleting_leaves_no_kv_however_a_document_was_read(server):
    before = blocks(server.engine)
    with server.http() as client:
        given = {"text": "The secret number of Rome is 100001. " * 30, "id": "rome"}
        assert client.post("/v1/documents", json={"documents": [given]}).status_code == 200
        question = "What is the secret number of Rome?"
        for system in ("Be brief.", "Be long."):  # behind other instructions: other KV
            messages = [
                {"role": "system", "content": system}, {"role": "user", "content": question},
            ]  # fmt: skip
            assert ask(server, "", ["rome"], messages=messages)[0] == "100001"
        assert blocks(server.engine) != before
        assert client.delete("/v1/documents/rome").status_code == 200
    assert blocks(server.engine) == before


def test_documents_stay_for_the_next_server(tmp_path):
    store = StoreConfig(host_bytes=0, disk_path=str(tmp_path / "store"))
    with running(store=store) as server, server.http() as client:
        client.post("/v1/documents", json={"documents": documents()[:2]})
    with running(store=store) as server:
        answer, cached = ask(server, SECOND.question, ["del", "assert"])
        assert (answer, cached > 200) == (SECOND.value, True)


def test_a_client_that_leaves_ends_the_reading(monkeypatch):
    """Its documents stay on record, and requests need not wait for them."""
    began, go_on, done = threading.Event(), threading.Event(), threading.Event()
    went = Shelf.stored

    def stored(self: Shelf, documents: list[Document]) -> None:
        went(self, documents)
        done.set()

    monkeypatch.setattr(Shelf, "stored", stored)
    with running(chunk_tokens=100) as server:
        slices, computed = server.engine.precompute_slices, []

        def slowly(*args):
            for cost in slices(*args):
                computed.append(cost)
                began.set()
                assert go_on.wait(LIMIT_S)
                yield cost

        monkeypatch.setattr(server.engine, "precompute_slices", slowly)
        given = {"text": "\n\n".join(f"{number} is a number. " * 10 for number in range(20))}
        body = json.dumps({"documents": [given]}).encode()
        with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
            connection.sendall(
                b"POST /v1/documents HTTP/1.1\r\nhost: 127.0.0.1\r\n"
                + f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert began.wait(LIMIT_S)
        server.ended(outcome="gone")  # while the first chunk is computed
        go_on.set()
        assert done.wait(LIMIT_S)
        with server.http() as client:
            [document] = client.get("/v1/documents").json()["data"]
        assert len(document["chunks"]) > len(computed)


def test_a_document_that_is_deleted_after_its_reader_has_left_leaves_nothing(monkeypatch):
    """The request still stores KV while it is cancelled."""
    began, go_on, done = threading.Event(), threading.Event(), threading.Event()
    end = Reading.end

    def ended(self: Reading, *args: Any) -> None:
        end(self, *args)
        done.set()

    monkeypatch.setattr(Reading, "end", ended)
    with running() as server, server.http() as client:
        given = {"text": "The secret number of Rome is 100001. " * 30, "id": "rome"}
        client.post("/v1/documents", json={"documents": [given]})
        server.engine.store.clear()  # as if it was evicted
        put = server.engine.store.put

        def slowly(blocks: Any) -> None:
            began.set()
            assert go_on.wait(LIMIT_S)
            put(blocks)

        monkeypatch.setattr(server.engine.store, "put", slowly)
        asked = {"messages": [{"role": "user", "content": "What?"}], "documents": ["rome"]}
        body = json.dumps({"model": server.model, "max_tokens": 5} | asked).encode()
        with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
                + f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert began.wait(LIMIT_S)
        server.ended(outcome="gone")
        assert client.delete("/v1/documents/rome").status_code == 200
        go_on.set()
        assert server.service.drain(LIMIT_S)
        assert done.wait(LIMIT_S)
        assert blocks(server.engine) == {0}


def test_requests_that_are_refused_leave_nothing_on_record(server, added, monkeypatch):
    noted: list[object] = []
    monkeypatch.setattr(Catalogue, "remember", lambda self, origin: noted.append(origin))
    monkeypatch.setattr(Catalogue, "note", lambda self, traces: noted.extend(traces))
    for number in range(5):
        messages = [
            {"role": "system", "content": f"Number {number}."}, {"role": "user", "content": "?"},
        ]  # fmt: skip
        with (
            pytest.raises(openai.BadRequestError, match="maximum context"),
            server.client() as asks,
        ):
            asks.chat.completions.create(
                model=server.model,
                messages=messages,
                max_tokens=10**6,
                extra_body={"documents": added},
            )
    assert not noted


def test_documents_that_a_stopping_server_refuses_are_not_on_record():
    with running() as server, server.http() as client:
        before = {"documents": [{"id": "a", "text": "Before."}]}
        added = client.post("/v1/documents", json=before).json()["data"]
        assert server.service.drain(LIMIT_S)
        wanted = [{"id": "a", "text": "Something else."}, {"id": "b", "text": "New."}]
        answer = client.post("/v1/documents", json={"documents": wanted})
        assert answer.json()["error"]["code"] == "shutting_down"
        assert client.get("/v1/documents").json()["data"] == added


def test_a_request_with_more_documents_than_there_is_room_for_is_refused(server, added):
    with pytest.raises(openai.BadRequestError, match="name fewer documents"):
        ask(server, SECOND.question, added * 1000)


def test_a_reading_that_the_server_does_not_end_is_told(monkeypatch):
    began = threading.Event()

    def endless(*args):
        while True:
            began.set()
            yield 1

    with running() as server, ThreadPoolExecutor() as threads, server.http() as client:
        monkeypatch.setattr(server.engine, "precompute_slices", endless)
        given = {"json": {"documents": [{"text": "A text."}]}}
        adding = threads.submit(client.post, "/v1/documents", **given)
        assert began.wait(LIMIT_S)
        server.service.close()
        answer = adding.result(LIMIT_S)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"


def test_who_waits_for_the_disk_holds_up_nobody(monkeypatch):
    """Neither others' requests nor the end of those that were given up."""
    goes = threading.Event()
    with running() as server, server.http() as client:
        store = server.engine.store
        given = documents()
        assert client.post("/v1/documents", json={"documents": given}).status_code == 200
        monkeypatch.setattr(store, "settle", lambda: goes.wait(LIMIT_S))
        with ThreadPoolExecutor(8) as others:
            waiting = [others.submit(client.delete, f"/v1/documents/{one['id']}") for one in given]
            assert len(waiting) >= THREADS
            waiting.append(others.submit(client.post, "/v1/documents", json={"documents": given}))
            try:
                assert client.get("/v1/documents").status_code == 200
                asked = {"model": server.model, "prompt": "One.", "max_tokens": 2}
                assert client.post("/v1/completions", json=asked).status_code == 200
                assert not any(future.done() for future in waiting)
            finally:
                goes.set()
            assert {future.result().status_code for future in waiting} == {200}


def test_a_deletion_that_failed_is_done_by_the_next_try(monkeypatch):
    with running() as server, server.http() as client:
        client.post("/v1/documents", json={"documents": documents()[:1]})
        before = blocks(server.engine)
        with monkeypatch.context() as failing:
            failing.setattr(server.engine.store, "delete", broken)
            url = f"/v1/documents/{documents()[0]['id']}"
            assert client.delete(url).status_code == 500
        assert blocks(server.engine) == before
        assert client.delete(url).status_code == 404, "it is on record no more"
        assert blocks(server.engine) == {0}


def broken(*_: object) -> None:
    raise StoreError("the disk failed")


def test_a_failed_write_of_somebody_is_nobodys_error(monkeypatch, tmp_path):
    store = StoreConfig(disk_path=str(tmp_path))
    with running(store=store) as server, server.http() as client:
        monkeypatch.setattr(server.engine.store._writer, "_error", StoreError("of another"))
        assert client.post("/v1/documents", json={"documents": documents()[:1]}).status_code == 200
        with pytest.raises(StoreError, match="of another"):  # who flushes hears of it
            server.engine.store.flush()


def test_who_leaves_while_documents_are_added_lets_nobody_past_the_quota(monkeypatch):
    given, adding, go_on = documents()[:2], threading.Event(), threading.Event()
    add = Shelf.add

    def slow(shelf, some):
        adding.set()
        assert go_on.wait(LIMIT_S)
        return add(shelf, some)

    with running() as plain, plain.http() as client:
        whole = client.post("/v1/documents", json={"documents": given[:1]}).json()
        quota = whole["data"][0]["tokens"] + 10
    monkeypatch.setattr(Shelf, "add", slow)
    keys = {"a": KeyConfig(key="sk-a", document_tokens=quota)}
    with running(keys=keys) as server, ThreadPoolExecutor(1) as pool:
        body = json.dumps({"documents": given[:1]}).encode()
        head = f"POST /v1/documents HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        head += "authorization: Bearer sk-a\r\ncontent-type: application/json\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(head.encode() + body)
            assert adding.wait(LIMIT_S)
        with server.http("sk-a") as client:
            asked = {"json": {"documents": given[1:]}}
            late = pool.submit(client.post, "/v1/documents", **asked)
            threading.Timer(0.3, go_on.set).start()
            assert late.result(LIMIT_S).status_code == 429
            kept = client.get("/v1/documents").json()["data"]
    assert [document["id"] for document in kept] == [given[0]["id"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wrong", [CatalogueError("no space left"), StoreError("the disk failed")])
def test_an_answer_is_given_though_it_cannot_be_noted(
    server, added, monkeypatch, caplog, stream, wrong
):
    def fails(*_: object) -> None:
        raise wrong

    monkeypatch.setattr(Reading, "end", fails)
    asked = {
        "model": server.model, "max_tokens": 8, "temperature": 0, "documents": added,
        "messages": [{"role": "user", "content": FIRST.question}], "stream": stream,
    }  # fmt: skip
    with server.http() as client:
        answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200
    assert "error" not in answer.text
    assert not stream or answer.text.endswith("data: [DONE]\n\n")
    [said] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert said.getMessage() == f"KV of an answer may outlive its documents: {wrong}"
    assert said.exc_info is None
