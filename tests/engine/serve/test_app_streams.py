"""Clients that leave, or do not read; requests that fail on the way. The service is scripted."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import openai
import pytest
import uvicorn

from engine.errors import Busy, DeadlineExceeded, EngineError, ServerStopping
from tests.engine.serve.scripted import Scripted
from tests.engine.serve.server import LIMIT_S, Running, running

ASKED = {"model": "needle-tiny", "prompt": "One", "max_tokens": 100}


@pytest.fixture(scope="module")
def server():
    with running(make=Scripted, wait_s=0.05, send_timeout_s=0.5) as made:
        yield made


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as made:
        yield made


def opened(server: Running, *, stream: bool, lack: int = 0) -> socket.socket:
    """A connection on which a request was sent, which may lack some bytes."""
    body = json.dumps(ASKED | {"stream": stream}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), LIMIT_S)
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
        "content-type: application/json\r\n\r\n".encode()
        + body[: len(body) - lack]
    )
    return connection


def heard(connection: socket.socket) -> bytes:
    """All that the server says before it ends the connection."""
    said = bytearray()
    with suppress(ConnectionResetError):
        while more := connection.recv(1 << 20):
            said += more
    return bytes(said)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_cancels_its_request(server, stream, begun):
    with opened(server, stream=stream) as connection:
        submitted = server.service.next()
        if begun:
            submitted.say("one")
            if stream:
                assert b"200 OK" in connection.recv(100)
    assert server.service.cancelled.get(timeout=LIMIT_S) == submitted.ticket
    line = server.ended(outcome="gone")
    assert line["status"] == (499 if not stream or not begun else 200)


def test_a_client_that_does_not_read_is_dropped(server, caplog):
    with opened(server, stream=True):
        submitted = server.service.next()
        for _ in range(30):  # more than the buffers of both ends take
            submitted.say("word " * 100_000)
        assert server.service.cancelled.get(timeout=LIMIT_S) == submitted.ticket
        assert server.ended(outcome="slow")["status"] == 200
    with server.http() as client:
        metrics = client.get("/metrics").text
    assert 'headrace_dropped_clients_total{reason="slow"} 1.0' in metrics
    assert not [said for said in caplog.messages if "ASGI" in said]


def test_a_stream_that_waits_says_so(server):
    with opened(server, stream=True) as connection:
        submitted = server.service.next()
        seen = b""
        while b": waiting" not in seen:
            seen += connection.recv(1000)
        submitted.end("all")
        while b"[DONE]" not in seen:
            seen += connection.recv(1000)
    assert server.ended(outcome="stop")["new_tokens"] == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DeadlineExceeded("late"), 408),
        (ServerStopping("stop"), 503),
        (EngineError("the step failed (SECRET)"), 500),
        (RuntimeError("SECRET"), 500),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_fails_before_the_first_token_has_a_status(
    server, threads, caplog, error, status, stream
):
    with server.http() as client:
        answer = threads.submit(client.post, "/v1/completions", json=ASKED | {"stream": stream})
        server.service.next().fail(error)
        got = answer.result(LIMIT_S)
    assert got.status_code == status
    assert "SECRET" not in got.text
    shown = [record for record in caplog.records if "SECRET" in caplog.text and record.exc_info]
    assert len(shown) == (type(error) is RuntimeError)  # a traceback, once


def test_what_fails_later_ends_the_stream_with_an_error(server, threads):
    said: list[str] = []

    def ask() -> None:
        with server.client() as client:
            for chunk in client.completions.create(**ASKED, stream=True):
                said.append(chunk.choices[0].text)

    answer = threads.submit(ask)
    submitted = server.service.next()
    submitted.say("one")
    submitted.say(" two")
    submitted.fail(DeadlineExceeded("late"))
    with pytest.raises(openai.APIError, match="timeout_s"):
        answer.result(LIMIT_S)
    assert "".join(said) == "one two"
    assert server.ended(outcome="deadline_exceeded", status=200)


def test_a_service_that_is_full_says_when_to_come_again(server):
    server.service.refusal = Busy("full")
    try:
        with server.client() as client, pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**ASKED)
    finally:
        server.service.refusal = None
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_request_without_a_body_yet_is_nobodys(server):
    with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        connection.sendall(b"content-type: application/json\r\ncontent-length: 10\r\n\r\n{")
    assert server.ended(outcome="gone")["status"] == 499


def test_a_request_that_runs_when_the_server_stops_is_told(threads):
    with httpx.Client(timeout=LIMIT_S) as client:
        with running(make=Scripted, drain_s=0.1) as server:
            asked = {"json": ASKED | {"stream": True}}
            answer = threads.submit(client.post, f"{server.url}/v1/completions", **asked)
            server.service.next().say("one")
            with server.http() as other:
                assert other.get("/readyz").status_code == 200
        got = answer.result(LIMIT_S)
    assert got.status_code == 200
    assert "one" in got.text
    assert "shutting_down" in got.text


def test_who_is_not_done_when_the_server_ends_is_told_or_cut_off(monkeypatch, caplog):
    config = uvicorn.Config

    def impatient(*args, **options):
        return config(*args, **options | {"timeout_graceful_shutdown": 0})

    monkeypatch.setattr(uvicorn, "Config", impatient)
    with ExitStack() as held:
        with running(make=Scripted, drain_s=0.1, send_timeout_s=LIMIT_S) as server:
            reader = held.enter_context(opened(server, stream=True))
            submitted = server.service.next()
            for _ in range(30):  # more than the buffers of both ends take
                submitted.say("word " * 100_000)
            sender = held.enter_context(opened(server, stream=True, lack=1))
            with server.http() as other:
                assert other.get("/readyz").status_code == 200
        head, _, body = heard(sender).partition(b"\r\n\r\n")
        assert b" 503 " in head
        assert json.loads(body)["error"]["code"] == "shutting_down"
        assert not heard(reader).endswith(b"0\r\n\r\n"), "it looks like a whole answer"
    assert not [said for said in caplog.messages if "ASGI" in said]
