"""A streaming client of `/v1/completions` that is light enough for many beside the server.

It speaks HTTP/1.1 over a bare connection, so that it can also vanish in every way a client can.
"""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

HOST = "127.0.0.1"
LINE_BYTES = 1 << 20

Leave = Literal["close", "reset"]  # as a client that hangs up, or one that crashed


class BadReply(Exception):
    """The server's answer is not what HTTP, SSE or OpenAI's format would have."""


@dataclass(slots=True)
class Reply:
    """What came of one request, and when.

    Args:
        error: why it is none; None for a good one, and for one that was left on purpose.
        times: of each event with text, in seconds from the request.
        left: whether the client went away before the end.
    """

    status: int = 0
    error: str | None = None
    times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    new_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    total_s: float = 0.0
    left: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return self.times[0] if self.times else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first, of the whole answer."""
        if self.new_tokens < 2 or len(self.times) < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.new_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one event and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def complete(
    port: int,
    body: dict[str, Any],
    *,
    timeout_s: float,
    leave_after: int | None = None,
    leave: Leave = "close",
    headers: tuple[str, ...] = (),
) -> Reply:
    """Stream one completion.

    Args:
        leave_after: go away behind so many events with text; 0: behind the request.
        timeout_s: of the whole request; past it the reply is an error.
    """
    reply, begun = Reply(), time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            await _talk(port, body, reply, begun, leave_after, leave, headers)
    except TimeoutError:
        reply.error = f"no end after {timeout_s:g} s"
    except (OSError, asyncio.IncompleteReadError, ValueError, BadReply) as error:
        reply.error = f"{type(error).__name__}: {error}"
    reply.total_s = time.perf_counter() - begun
    return reply


async def _talk(
    port: int,
    body: dict[str, Any],
    reply: Reply,
    begun: float,
    leave_after: int | None,
    leave: Leave,
    headers: tuple[str, ...],
) -> None:
    reader, writer = await asyncio.open_connection(HOST, port, limit=LINE_BYTES)
    try:
        writer.write(_request(port, body | {"stream": True}, headers))
        await writer.drain()
        if leave_after == 0:
            reply.left = True
            return
        async for event in _events(reader, reply):
            if _took(reply, event) and _stamped(reply, begun) == leave_after:
                reply.left = True
                return
        _check(reply)
    finally:
        _hang_up(writer, leave if reply.left else "close")
        with suppress(OSError):  # whatever there was to say was said before
            await writer.wait_closed()


def _request(port: int, body: dict[str, Any], headers: tuple[str, ...]) -> bytes:
    payload = msgspec.json.encode(body)
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"host: {HOST}:{port}",
        "content-type: application/json",
        f"content-length: {len(payload)}",
        "connection: close",
        *headers,
    )
    return "\r\n".join((*lines, "", "")).encode() + payload


def _hang_up(writer: asyncio.StreamWriter, leave: Leave) -> None:
    if leave == "reset":  # the kernel then says RST, and forgets what was not sent
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    else:
        writer.close()


async def _events(reader: asyncio.StreamReader, reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each `data:` line up to [DONE], or to the end where a server sends none."""
    reply.status, chunked = await _head(reader)
    if reply.status != 200:
        rest = await reader.read(LINE_BYTES)
        raise BadReply(f"status {reply.status}: {rest[:300].decode(errors='replace')}")
    if not chunked:
        raise BadReply("a stream needs transfer-encoding: chunked")
    async for line in _lines(_chunks(reader)):
        if line == b"data: [DONE]":
            continue
        if line.startswith(b"data: "):
            yield msgspec.json.decode(line[6:])
        elif line and not line.startswith(b":"):
            raise BadReply(f"not an event: {line[:100]!r}")


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether chunks follow."""
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    return int(lines[0].split(b" ")[1]), b"transfer-encoding: chunked" in lines


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if not (size := int(line, 16)):
            await reader.readline()
            return
        yield (await reader.readexactly(size + 2))[:-2]
    raise BadReply("the stream is cut off")


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if rest:
        raise BadReply(f"the stream ends in the middle of a line: {rest[:100]!r}")


def _took(reply: Reply, event: dict[str, Any]) -> bool:
    """Note what an event says; whether it had text."""
    if "error" in event:
        raise BadReply(f"error in the stream: {event['error']}")
    if usage := event.get("usage"):
        reply.new_tokens = usage["completion_tokens"]
        reply.prompt_tokens = usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        reply.cached_tokens = details.get("cached_tokens") or 0
    if not event["choices"]:
        return False
    [choice] = event["choices"]
    reply.finish = choice.get("finish_reason") or reply.finish
    if choice["text"]:
        reply.text.append(choice["text"])
    return bool(choice["text"])


def _stamped(reply: Reply, begun: float) -> int:
    reply.times.append(time.perf_counter() - begun)
    return len(reply.times)


def _check(reply: Reply) -> None:
    """A stream must say how it ended, and count what it sent."""
    if reply.finish not in ("stop", "length"):
        raise BadReply(f"the stream ended without a finish_reason: {reply.finish!r}")
    if not reply.new_tokens or len(reply.times) > reply.new_tokens:
        raise BadReply(f"{len(reply.times)} events with text, usage {reply.new_tokens} tokens")
