"""HTTP/1.1 as uvicorn speaks it, with what keeps broken and slow clients from costing anything."""

import asyncio
import socket
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

ABORT = "headrace.abort"  # in a request's scope: drops the connection, whatever waits to be sent


class Protocol(H11Protocol):
    """uvicorn's, but headers have a time limit, and a reader that is gone does not hold memory.

    The limits are set on subclasses: see `limited`.
    """

    header_timeout_s: float
    send_timeout_s: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        app: Any = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            await app(scope | {ABORT: self.transport.abort}, receive, send)

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_options(transport.get_extra_info("socket"))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
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
        self._refuse(400, "Bad Request", msg)

    def _set_options(self, connection: Any) -> None:
        # asyncio does that for sockets it made; a token must not wait for the last one's receipt
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            # also of what is left to send after the last request, when no handler waits any more
            limit_ms = max(1, int(self.send_timeout_s * 1000))
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
            self._refuse(408, "Request Timeout", "The request's headers took too long.")

    def _refuse(self, status: int, reason: str, message: str) -> None:
        self._head_came()
        if self.cycle is not None and self.cycle.response_started != self.cycle.response_complete:
            self.transport.close()  # in the middle of an answer there is no place for another
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = msgspec.json.encode({"error": error})
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def limited(header_timeout_s: float, send_timeout_s: float) -> type[Protocol]:
    """The protocol with these limits."""
    limits = {"header_timeout_s": header_timeout_s, "send_timeout_s": send_timeout_s}
    return type("LimitedProtocol", (Protocol,), limits)
