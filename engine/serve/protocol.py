"""HTTP/1.1 as uvicorn speaks it, with what keeps broken and slow clients from costing anything."""

import asyncio
import logging
import socket
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.serve.refusals import Refusal, invalid, overloaded

access = logging.getLogger("headrace.access")

LONGEST_MS = 2**31 - 1  # that the system takes
LINGER_S = 1.0  # to a connection too many, which may have sent something
LINGERING = 64  # such connections; of a flood, the others have no answer
ABORT = "headrace.abort"  # in a request's scope: drops the connection, whatever waits to be sent


class Protocol(H11Protocol):
    """uvicorn's, but headers have a time limit, and a reader that is gone does not hold memory.

    The limits are set on subclasses: see `limited`.
    """

    header_timeout_s: float
    send_timeout_s: float
    most: int  # connections
    lingering: "set[Protocol]"  # beyond these

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._surplus: asyncio.TimerHandle | None = None  # ends one that is too many
        app: Any = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            await app(scope | {ABORT: self._abort}, receive, send)

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_options(transport.get_extra_info("socket"))
        if len(self.connections) > self.most:
            self._refuse_surplus()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        if self._surplus is not None:
            self._surplus.cancel()
            self.lingering.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._surplus is not None:
            return  # read, so that the answer is not lost with what was sent
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._head_came()
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        begun, _ = self.conn.trailing_data
        if begun and self.cycle.response_complete:  # of the next head, while nobody waited for it
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Our answer to what is not HTTP, in the shape of all others."""
        self._refuse(invalid(msg))

    def _abort(self) -> None:
        """Drop the connection, which uvicorn learns later: an answer cut off is no mistake."""
        self.transport.abort()
        self.cycle.disconnected = True

    def _set_options(self, connection: Any) -> None:
        # asyncio does that for sockets it made; a token must not wait for the last one's receipt
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            # also of what is left to send after the last request, when no handler waits any more
            limit_ms = max(1, int(min(self.send_timeout_s * 1000, LONGEST_MS)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)

    def _expect_head(self) -> None:
        """From the first byte on (the connection's, for the first request) a head has so long."""
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(Refusal(408, "The request's headers took too long."))

    def _refuse_surplus(self) -> None:
        """Nobody reads what this one asks. It is not counted, and has a second to take that."""
        self.connections.discard(self)
        if len(self.lingering) >= LINGERING:
            self.transport.abort()
            return
        self.lingering.add(self)
        refusal = overloaded("The server is overloaded: too many connections are open.")
        self._surplus = self.loop.call_later(LINGER_S, self.transport.abort)
        self.transport.write(_answer(refusal))
        with suppress(OSError):  # it is gone since
            self.transport.write_eof()
        said = {"time": round(time.time(), 3), "status": 503, "outcome": "too_many_connections"}
        access.info("%s", msgspec.json.encode(said).decode())

    def _refuse(self, refusal: Refusal) -> None:
        self._head_came()
        if self.cycle is not None and self.cycle.response_started != self.cycle.response_complete:
            self.transport.close()  # in the middle of an answer there is no place for another
            return
        self.transport.write(_answer(refusal))
        self.transport.close()


def limited(header_timeout_s: float, send_timeout_s: float, most: int) -> type[Protocol]:
    """The protocol with these limits; `most` connections are served at once."""
    limits = {
        "header_timeout_s": header_timeout_s,
        "send_timeout_s": send_timeout_s,
        "most": most,
        "lingering": set(),
    }
    return type("LimitedProtocol", (Protocol,), limits)


def _answer(refusal: Refusal) -> bytes:
    """All of it, without an application."""
    body = refusal.body()
    headers = refusal.headers | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = [
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
