"""Broken and slow clients: what they send, and what came of it."""

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

HOST = "127.0.0.1"
PACE_S = 0.02  # between the pieces of a slow client
STATUS = re.compile(r"HTTP/1\.1 \d{3} .*")

End = Literal["half", "stay", "close"]


@dataclass(frozen=True, slots=True)
class Case:
    """A connection: what is sent, in which pieces, and what the client does behind it.

    Args:
        end: "half": it says that nothing more comes. "stay": it says nothing, and waits for the
            server. "close": it is gone.
    """

    pieces: tuple[bytes, ...]
    end: End = "half"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints: a failure must be readable."""
        shown = [piece if len(piece) < 300 else (len(piece), piece[:200]) for piece in self.pieces]
        printer.text(f"Case({shown}, {self.end!r})")


async def outcome(port: int, case: Case, limit_s: float) -> bytes:
    """All that the server says before it ends the connection; TimeoutError if it does not end it.

    A server may end it while the client still sends: that is an answer, too.
    """
    said = bytearray()
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            await _talk(reader, writer, case, said)
        except TimeoutError:
            raise
        except OSError:  # reset, or ended between two of our calls
            return bytes(said)
        finally:
            writer.transport.abort()  # without what could not be sent
            with suppress(OSError):
                await writer.wait_closed()
    return bytes(said)


async def _talk(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case, said: bytearray
) -> None:
    for number, piece in enumerate(case.pieces):
        writer.write(piece)
        await writer.drain()
        if number < len(case.pieces) - 1:  # the pause is what makes it slow
            said += await _heard(reader)
            if reader.at_eof():
                return
    if case.end == "close":
        return
    if case.end == "half":
        writer.write_eof()
    while more := await reader.read(1 << 16):
        said += more


async def _heard(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(1 << 20), PACE_S)
    except TimeoutError:
        return b""


async def outcomes(port: int, cases: Sequence[Case], limit_s: float) -> list[bytes]:
    """Of many connections at once."""
    return await asyncio.gather(*(outcome(port, case, limit_s) for case in cases))


@dataclass(frozen=True, slots=True)
class Answer:
    """One of a connection's."""

    status: int
    headers: dict[str, str]
    body: bytes


def answers(said: bytes) -> list[Answer]:
    """All that a server said on a connection, of which the last may be cut off."""
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        assert STATUS.fullmatch(first), f"not HTTP: {first[:200]!r}"
        headers = dict(line.lower().split(": ", 1) for line in lines)
        size = int(headers.get("content-length", len(said)))
        if said.startswith(b"HTTP/1.1 "):  # the one before answers a HEAD
            size = 0
        found.append(Answer(int(first.split()[1]), headers, said[:size]))
        said = said[size:]
    return found


def statuses(said: bytes) -> list[int]:
    return [answer.status for answer in answers(said)]


def check(said: bytes) -> None:
    """No status of 500 or above but 503, and an error's body is OpenAI's."""
    for answer in answers(said):
        assert answer.status < 500 or answer.status == 503, answer
        if answer.status >= 400 and answer.body:
            assert answer.headers["content-type"] == "application/json", answer
            assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}


# what is sent

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/documents", "/v1/documents/x", "/v1/models",
    "/", "/stats", "/metrics", "/healthz", "/openapi.json", "/traces", "/../../etc/passwd", "/%00",
    "/v1/documents/%2e%2e%2f", "/" + "a" * 70_000, "*", "http://elsewhere/", "",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "G\0T", "", "PRI")
HEADERS = (
    b"x: " + b"y" * 70_000, b"content-length: 5, 6", b"content-length: -1", b"content-length: 1e9",
    b"content-length: 99999999999999999999", b"transfer-encoding: chunked, gzip", b"\xff\xfe: \x00",
    b"transfer-encoding: chunked\r\ncontent-length: 4", b"expect: 100-continue", b"no colon here",
    b": empty", b"host: a\r\nhost: b", b"connection: upgrade\r\nupgrade: websocket",
    b"authorization: Bearer \xff\x00", b"traceparent: 00-zz", b"x-request-id: a\tb" + b"c" * 9000,
    b"content-type: text/plain", b"content-encoding: gzip", b" folded: yes",
)  # fmt: skip
VALUES = (
    "NaN", "-Infinity", "1e999", "9" * 400, "-1", "null", "true", '"x"', "[]", "{}", "1.5",
    '"' + "a" * 20_000 + '"', '"\\ud800"', "0", '[{"role":"user","content":7}]', '["a","b"]',
    "[[[[1]]]]", "[[1e9]]",
    '{"include_usage":"yes"}', "[99999999]", "[-5]", '""', '"\\u0000"',
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "stop", "seed", "stream",
    "stream_options", "n", "logprobs", "top_logprobs", "documents", "blend", "priority",
    "timeout_s",
    "top_k", "logit_bias", "user", "tools", "nobody_knows", "echo", "metadata",
)  # fmt: skip
GOOD = {
    "/v1/completions": '{"model":"needle-tiny","prompt":"a","max_tokens":1,%s}',
    "/v1/chat/completions": '{"model":"needle-tiny","messages":[{"role":"user","content":"a"}],'
    '"max_tokens":1,%s}',
    "/v1/documents": '{"documents":[{"text":"a",%s}]}',
}
DEEP = 100_000


def request(method: str, path: str, *headers: bytes, body: bytes = b"") -> bytes:
    """One that is right but for what it is given; it says its length if no header does."""
    lines = [f"{method} {path} HTTP/1.1".encode("utf-8", "surrogateescape"), b"host: 127.0.0.1"]
    if not any(b"content-length" in x or b"transfer-encoding" in x for x in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, *headers, b"", b""]) + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[x : x + size] for x in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(x), x) for x in pieces) + b"0\r\n\r\n"


@st.composite
def jsons(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body with a field that is wrong, twice there, deep, or no text at all."""
    path = draw(st.sampled_from(sorted(GOOD)))
    pair = f'"{draw(st.sampled_from(FIELDS))}":{draw(st.sampled_from(VALUES))}'
    good = (GOOD[path] % pair).encode()
    kind = draw(
        st.sampled_from(["field", "field", "field", "deep", "objects", "bytes", "cut", "no"])
    )
    if kind == "deep":
        return path, b"[" * draw(st.sampled_from([DEEP, 3])) + b"]" * DEEP
    if kind == "objects":
        return path, b'{"messages":' * 20_000
    if kind == "bytes":
        return path, draw(st.binary(max_size=60))
    if kind == "cut":
        return path, good[: draw(st.integers(0, len(good)))]
    return path, good if kind == "field" else good.replace(b'"a"', b'"\xff\xfe\xed\xa0\x80"')


@st.composite
def connections(draw: st.DrawFn) -> bytes:
    """The bytes of one connection."""
    kind = draw(st.sampled_from(["json", "json", "line", "header", "noise", "chunks", "pipeline"]))
    if kind == "noise":
        return draw(st.one_of(st.binary(min_size=1, max_size=300), st.just(b"\r\n" * 40_000)))
    if kind == "line":
        return request(draw(st.sampled_from(METHODS)), draw(st.sampled_from(PATHS)))
    path, body = draw(jsons())
    if kind == "header":
        return request("POST", path, draw(st.sampled_from(HEADERS)), body=body)
    if kind == "chunks":
        sent = chunked(body, draw(st.sampled_from([1000, 7])))
        if draw(st.booleans()):
            sent = (
                draw(st.sampled_from([b"zz\r\n", b"-5\r\nhello", b"fffffffffffffffff\r\n"])) + sent
            )
        return request("POST", path, b"transfer-encoding: chunked", body=sent)
    if kind == "pipeline":
        return request("POST", path, body=body) * 2 + draw(st.binary(max_size=40))
    return request("POST", path, body=body)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A connection that may be cut off, or come in pieces."""
    sent = draw(connections())
    if draw(st.integers(0, 3)) == 0:
        sent = sent[: draw(st.integers(0, len(sent)))]
    pieces: tuple[bytes, ...] = (sent,)
    if draw(st.integers(0, 3)) == 0:
        cuts = sorted(draw(st.lists(st.integers(0, len(sent)), min_size=1, max_size=5)))
        pieces = tuple(sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)]))
    return Case(pieces, draw(st.sampled_from(["half", "half", "stay", "close"])))
