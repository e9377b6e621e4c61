"""Whatever bytes come: never a 500, never a hang, and nothing is left behind."""

import asyncio
import os

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.serve.server import LIMIT_S, Running, running
from tests.engine.serve.sockets import (
    DEEP,
    Case,
    cases,
    check,
    chunked,
    outcome,
    outcomes,
    request,
    statuses,
)

HEADER_S = BODY_S = 0.4
IDLE_S = 1.0
ANSWER_S = 20.0  # nothing here takes a tenth of it
GOOD = {"model": "needle-tiny", "prompt": "a", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running(
        header_timeout_s=HEADER_S,
        body_timeout_s=BODY_S,
        idle_timeout_s=IDLE_S,
        max_new_tokens=4,
        body_bytes=1 << 20,
        header_bytes=1 << 14,
    ) as made:
        yield made


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def fuzz(server: Running, batch: list[Case]) -> None:
    for said in asyncio.run(outcomes(server.port, batch, ANSWER_S)):
        check(said)


def check_idle(server: Running) -> None:
    """It still serves, and no request, place or pin is left."""
    reply = httpx.post(f"{server.url}/v1/completions", json=GOOD, timeout=LIMIT_S)
    assert reply.json()["usage"]["completion_tokens"] == 2
    for _ in range(10_000):  # requests of clients that left end with the next step
        stats = httpx.get(f"{server.url}/stats", timeout=LIMIT_S).json()
        counts = [stats["requests"][x] for x in ("waiting", "running", "swapped", "background")]
        if not any(counts):
            break
    assert counts == [0, 0, 0, 0]
    assert stats["running"]["device_bytes"] == 0
    assert stats["pinned_blocks"] == 0


@settings(max_examples=8)
@given(batch=st.lists(cases(), min_size=8, max_size=16))
def test_no_bytes_make_it_fail_or_hang(server, batch):
    fuzz(server, batch)
    check_idle(server)


@pytest.mark.slow
@settings(max_examples=400)
@given(batch=st.lists(cases(), min_size=8, max_size=16))
def test_many_bytes_do_not_make_it_fail_or_hang(server, batch):
    fuzz(server, batch)
    check_idle(server)


def test_files_are_closed_when_clients_are_gone(server):
    stays = [Case((request("POST", "/v1/completions", body=b"{}")[:n],), "stay") for n in range(40)]
    fuzz(server, stays)
    before = open_files()
    fuzz(server, stays)
    assert open_files() <= before


BODY = b'{"model":"needle-tiny","prompt":"a","max_tokens":1}'
PATH, CHAT = "/v1/completions", "/v1/chat/completions"
POST = request("POST", PATH, body=BODY)
LAST = b"connection: close"


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (request("POST", PATH, LAST, body=BODY), [200]),
        (POST + request("POST", PATH, LAST, body=BODY), [200, 200]),
        (b"nonsense\r\n\r\n", [400]),
        (b"\x16\x03\x01\x02\x00\x01\x00", [400]),  # TLS
        (request("POST", PATH, b"x: " + b"y" * (1 << 20), body=BODY), [400]),
        (request("GET", "/" + "a" * (1 << 20)), [400]),
        (request("POST", PATH, LAST, body=b"[" * DEEP + b"]" * DEEP), [400]),
        (request("POST", PATH, LAST, body=b'{"a":' * DEEP), [400]),
        (request("POST", CHAT, LAST, body=b'{"tools":' + b"[" * DEEP + b"]" * DEEP + b"}"), [400]),
        (request("POST", PATH, LAST, body=BODY.replace(b'"a"', b'""')), [400]),
        (request("POST", PATH, LAST, body=BODY.replace(b"1}", b"NaN}")), [400]),
        (request("POST", PATH, LAST, body=BODY.replace(b'"a"', b'"\xff"')), [400]),
        (request("POST", PATH, LAST, body=BODY.replace(b"1}", b"1e999}")), [400]),
        (request("POST", PATH, body=b" " * (1 << 21)), [413]),
        (request("POST", PATH, b"content-type: text/xml", body=BODY), [415]),
        (request("PUT", PATH, LAST, body=BODY), [405]),
        (request("POST", "/v1/elsewhere", LAST, body=BODY), [404]),
        (
            request("POST", PATH, b"transfer-encoding: chunked", body=chunked(BODY, 3)),
            [200],
        ),
        (request("POST", PATH, b"transfer-encoding: chunked", body=b"zz\r\n"), [400]),
    ],
)
def test_what_is_wrong_has_its_status(server, sent, wanted):
    said = asyncio.run(outcome(server.port, Case((sent,), "stay"), ANSWER_S))
    check(said)
    assert statuses(said) == wanted, said[:300]


SLOW_HEADERS = tuple(bytes([x]) for x in POST[:60])  # 1.2 s of them
SLOW_BODY = (POST[:-30], *(bytes([x]) for x in POST[-30:]))  # and 0.6 s of these


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ((b"",), [408]),
        ((POST[:50],), [408]),
        (SLOW_HEADERS, [408]),
        ((POST[:-3],), [408]),
        (SLOW_BODY, [408]),
        (
            (request("POST", PATH, b"transfer-encoding: chunked", body=b"5\r\n{"),),
            [408],
        ),
        ((POST + POST[:20],), [200, 408]),  # the half of the next one has a limit, too
        ((POST,), [200]),  # the connection is kept for a while
    ],
)
def test_who_is_slow_is_let_go(server, pieces, wanted):
    said = asyncio.run(outcome(server.port, Case(pieces, "stay"), ANSWER_S))
    check(said)
    assert statuses(said) == wanted, said[:300]


def test_a_flood_of_connections_is_refused_and_over():
    with running(max_connections=8, header_timeout_s=HEADER_S, idle_timeout_s=IDLE_S) as server:
        flood = [Case((POST,), "stay") for _ in range(40)]
        found = [statuses(x) for x in asyncio.run(outcomes(server.port, flood, ANSWER_S))]
        assert [503] in found
        assert {status for one in found for status in one} <= {200, 503}
        check_idle(server)
