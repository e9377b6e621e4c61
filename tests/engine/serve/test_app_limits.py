"""What one client may not do to the others: too much, too large, too slow. The service is
scripted."""

import gc
import json
import socket
import struct
from asyncio.selector_events import _SelectorSocketTransport
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import Queue

import openai
import pytest

from engine.errors import ConfigError, DeadlineExceeded
from engine.serve import protocol
from engine.serve.config import KeyConfig
from engine.serve.generate import Job
from engine.serve.protocol import LINGERING
from engine.serve.server import OWN_FILES
from engine.serve.wire import CompletionRequest
from tests.engine.serve.scripted import Scripted
from tests.engine.serve.server import LIMIT_S, Running, process, running

ASKED = {"model": "needle-tiny", "prompt": [5, 6, 7], "max_tokens": 100}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server():
    with running(
        make=Scripted,
        max_concurrent=2,
        body_bytes=1000,
        header_bytes=4096,
        header_timeout_s=0.3,
        body_timeout_s=0.3,
        max_prompt_tokens=10,
        max_new_tokens=100,
    ) as made:
        yield made


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as made:
        yield made


def raw(server: Running, *parts: bytes) -> bytes:
    """All that the server answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
        for part in parts:
            connection.sendall(part)
        seen = b""
        while piece := connection.recv(65536):
            seen += piece
        return seen


def error(answer: bytes) -> tuple[int, dict[str, str]]:
    """Status and error of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_body_that_is_too_large_is_refused(server):
    with server.http() as client:
        for size in (1001, 3000, 10_000_000):
            answer = client.post(
                "/v1/completions",
                content=b'"' + b"x" * (size - 2) + b'"',
                headers={"content-type": "application/json"},
            )
            assert answer.status_code == 413, size
            assert answer.json()["error"]["code"] == "request_too_large"


def test_so_is_one_that_does_not_say_how_large_it_is(server):
    chunk = b"200\r\n" + b"x" * 512 + b"\r\n"
    answer = raw(server, HEAD + b"transfer-encoding: chunked\r\n\r\n", chunk * 3, b"0\r\n\r\n")
    assert error(answer)[0] == 413
    endless = raw(server, HEAD + b"transfer-encoding: chunked\r\n\r\n", chunk * 20)
    assert error(endless)[0] == 413


def test_headers_that_are_too_large_or_too_slow_are_refused(server):
    status, _ = error(raw(server, b"GET / HTTP/1.1\r\nx: " + b"x" * 10_000))
    assert status == 400
    status, said = error(raw(server, b"GET / HTTP/1.1\r\nhost: 127"))
    assert (status, said["type"]) == (408, "invalid_request_error")
    status, _ = error(raw(server))  # nothing at all
    assert status == 408


def test_the_next_request_of_a_connection_has_a_limit_too(server):
    first = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    answer = raw(server, first + b"GET /healthz HT")  # when nobody waits for it yet
    assert answer.count(b"HTTP/1.1") == 2
    assert b"HTTP/1.1 200 OK" in answer
    assert b"HTTP/1.1 408 " in answer
    with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as connection:
        connection.sendall(first)
        seen = b""
        while not seen.endswith(b'"ok"}'):
            seen += connection.recv(1000)
        connection.sendall(b"G")  # when it is waited for
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_is_too_slow_is_refused(server):
    answer = raw(server, HEAD + b"content-length: 100\r\n\r\n", b"{")
    assert error(answer)[0] == 408
    assert server.ended(outcome="request_timeout")["status"] == 408


@pytest.mark.parametrize(
    "broken",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.x\r\n\r\n",
        b"GET /\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: " + b"9" * 3000 + b"\r\n\r\n",
        HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_nobody_else_notices(server, broken):
    answer = raw(server, broken)
    assert answer[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 413 "), answer
    with server.http() as client:
        assert client.get("/healthz").status_code == 200


def test_too_many_at_once_are_told_to_come_again(server, threads):
    def ask() -> str:
        with server.client() as client:
            return client.completions.create(**ASKED).choices[0].text

    running_ = [threads.submit(ask) for _ in range(2)]
    submitted = [server.service.next() for _ in range(2)]
    with pytest.raises(openai.InternalServerError) as refused:
        ask()
    assert refused.value.status_code == 503  # no limit of the client's own is reached
    assert refused.value.code == "overloaded"
    assert refused.value.response.headers["retry-after"] == "1"
    for one in submitted:
        one.end("done")
    assert [one.result(LIMIT_S) for one in running_] == ["done", "done"]
    server.ended(outcome="stop")
    server.ended(outcome="stop")
    last = threads.submit(ask)  # both places are free again
    server.service.next().end("again")
    assert last.result(LIMIT_S) == "again"


def test_a_place_is_given_back_whatever_a_request_was(server, threads):
    wrong = [{"prompt": [5] * 11}, {"max_tokens": 101}, {"model": "other"}, {"n": 2}]
    with server.http() as client:
        for change in wrong:
            answer = client.post("/v1/completions", json=ASKED | change)
            assert answer.status_code in (400, 404), change
        for stream, begun in ((True, True), (True, False), (False, False)) * 3:
            asked = {"json": ASKED | {"stream": stream}}
            done = threads.submit(client.post, "/v1/completions", **asked)
            submitted = server.service.next()
            if begun:
                submitted.say("one")
            submitted.fail(RuntimeError("on purpose"))
            assert done.result(LIMIT_S).status_code == (200 if begun else 500)
        done = threads.submit(client.post, "/v1/completions", json=ASKED)
        server.service.next().end("fine")
        assert done.result(LIMIT_S).status_code == 200


def test_a_prompt_may_be_shorter_than_the_model_allows(server):
    with server.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**ASKED | {"prompt": [5] * 11})
    assert refused.value.code == "context_length_exceeded"


def test_each_key_has_its_own_requests_and_tokens(threads):
    keys = {
        "few": KeyConfig(key="few", requests_per_minute=2, max_concurrent=1),
        "short": KeyConfig(key="short", tokens_per_minute=10),
        "any": KeyConfig(key="any"),
    }

    with running(make=Scripted, keys=keys) as server:

        def ask(key: str, prompt: int = 1) -> str:
            with server.client(key) as client:
                asked = ASKED | {"prompt": [5] * prompt}
                return client.completions.create(**asked).choices[0].text

        def answered(key: str, tokens: int, prompt: int = 1) -> None:
            asking = threads.submit(ask, key, prompt)
            submitted = server.service.next()
            assert submitted.ask.tenant == key
            for _ in range(tokens - 1):
                submitted.say("x")
            submitted.end()
            asking.result(LIMIT_S)

        answered("few", 1)
        asking = threads.submit(ask, "few")
        submitted = server.service.next()
        with pytest.raises(openai.RateLimitError):  # one at once, and the third in a minute
            ask("few")
        submitted.end()
        asking.result(LIMIT_S)
        with pytest.raises(openai.RateLimitError, match="2 requests per minute") as refused:
            ask("few")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
        answered("short", tokens=8, prompt=3)  # 11 tokens: one is owed
        with pytest.raises(openai.RateLimitError, match="10 tokens per minute") as refused:
            ask("short")
        assert refused.value.type == "tokens"
        answered("any", 20, prompt=20)


def test_connections_that_do_nothing_are_closed_and_not_too_many():
    healthy = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with running(make=Scripted, idle_timeout_s=1.0, max_connections=2) as server:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as idle:
            idle.sendall(healthy)
            assert idle.recv(100).startswith(b"HTTP/1.1 200")
            with socket.create_connection(("127.0.0.1", server.port), LIMIT_S) as other:
                other.sendall(healthy)
                assert other.recv(100).startswith(b"HTTP/1.1 200")
                for _ in range(3):
                    answer = raw(server, healthy)
                    status, said = error(answer)
                    assert (status, said["code"]) == (503, "overloaded")
                    assert b"\r\nretry-after: 1\r\n" in answer
                    assert server.ended(outcome="too_many_connections")["status"] == 503
        assert raw(server, healthy).startswith(b"HTTP/1.1 200")  # until the server closes it


@pytest.mark.parametrize("wrong", [[5] * 100_000, [5] * 11, [5]])
def test_a_request_that_fails_is_gone_when_its_answer_is(wrong, threads):
    """Errors know the frames they came through, which know them: such rings last until Python
    looks for some, and large requests with them."""

    def there():
        return [x for x in gc.get_objects() if type(x) in (CompletionRequest, Job)]

    with running(make=Scripted, max_prompt_tokens=10) as server:
        gc.collect()
        before = there()  # of other tests: what they logged knows them
        gc.disable()
        try:
            with server.http() as client:
                body = ASKED | {"prompt": wrong, "max_tokens": 1}
                asking = threads.submit(client.post, "/v1/completions", json=body)
                if len(wrong) == 1:
                    server.service.next().fail(DeadlineExceeded("on purpose"))
                assert asking.result(LIMIT_S).status_code == (408 if len(wrong) == 1 else 400)
                for _ in range(100):  # the thread that refused it may be at its last line
                    assert client.get("/healthz").status_code == 200
                    left = [x for x in there() if all(x is not known for known in before)]
                    if not left:
                        break
                assert not left
        finally:
            gc.enable()


def test_of_a_flood_so_many_are_told_and_all_others_are_gone_at_once(monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_S", LIMIT_S)
    with running(make=Scripted, max_connections=1) as server, ExitStack() as held:
        here = "127.0.0.1", server.port
        flood = [
            held.enter_context(socket.create_connection(here, LIMIT_S))
            for _ in range(LINGERING + 11)
        ]
        told = [_told(connection) for connection in flood[1:]]  # the first one is served
        assert told.count(503) == LINGERING
        assert told.count(None) == 10


def test_a_connection_too_many_may_be_gone_while_it_is_told(monkeypatch, caplog):
    gone: Queue[OSError | None] = Queue()
    held: list[socket.socket] = []
    write_eof = _SelectorSocketTransport.write_eof

    def after_its_end(transport):
        with held[-1] as connection:  # whose end is a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            write_eof(transport)
        except OSError as error:
            gone.put(error)
            raise
        gone.put(None)

    monkeypatch.setattr(_SelectorSocketTransport, "write_eof", after_its_end)
    here = "127.0.0.1"
    with running(make=Scripted, max_connections=1) as server:
        with socket.create_connection((here, server.port), LIMIT_S):
            held.append(socket.create_connection((here, server.port), LIMIT_S))
            assert isinstance(gone.get(timeout=LIMIT_S), OSError)
            assert server.ended(outcome="too_many_connections")["status"] == 503
        assert raw(server, b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert not [said for said in caplog.records if said.name == "asyncio"]


def test_connections_leave_files_for_the_work():
    few = 8
    with process(files=OWN_FILES + few) as server, ExitStack() as held:
        port = int(server.url.rpartition(":")[2])
        flood = [
            held.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
            for _ in range(OWN_FILES + 2 * few)
        ]
        asked = json.dumps(ASKED | {"max_tokens": 2}).encode()
        flood[few - 1].sendall(HEAD + b"content-length: %d\r\n\r\n" % len(asked) + asked)
        assert flood[few - 1].recv(100).startswith(b"HTTP/1.1 200")
        assert _told(flood[few]) == 503
        held.close()
        assert server.stop() == 0
    assert "8 connections are served at once, not serve.max_connections" in server.stderr[0]
    assert len(server.stderr) == 2, "".join(server.stderr)  # one line more: that it is ready


def test_too_few_files_for_any_connection_are_a_mistake(monkeypatch):
    monkeypatch.setattr("engine.serve.server.room_for", lambda files: OWN_FILES)
    with pytest.raises(ConfigError, match="raise its limit"), running():
        pass


def _told(connection: socket.socket) -> int | None:
    """The status that a connection is told; None where the server has just ended it."""
    try:
        said = connection.recv(100)
    except ConnectionResetError:
        return None
    return int(said.split()[1]) if said else None
