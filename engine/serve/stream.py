"""Server-sent events to a client that may be slow, or leave."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.serve.body import Gone, unless_gone
from engine.serve.call import CALL, Call
from engine.serve.protocol import ABORT
from engine.service.spans import span

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # for proxies that would rather send all at once
}


class EventStream(Response):
    """Sends what `frames` yields, each when it is there.

    Args:
        frames: bytes; it must not raise. It is closed when the client has left.
        timeout_s: for the client to make room for a frame; then it is dropped.
        release: called at the end, whatever it was.
    """

    def __init__(
        self, frames: AsyncGenerator[bytes], timeout_s: float, release: Callable[[], None]
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._frames, self._timeout_s, self._release = frames, timeout_s, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope[CALL]
        try:
            await unless_gone(receive, self._send(send, call))
        except Gone:
            call.dropped = "gone"
        except TimeoutError:
            call.dropped = "slow"
            scope[ABORT]()
        finally:
            self._release()

    async def _send(self, send: Send, call: Call) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._frames) as frames:
            await self._within(send(start), call)
            async for frame in frames:
                body = {"type": "http.response.body", "body": frame, "more_body": True}
                await self._within(send(body), call)
        await self._within(send({"type": "http.response.body", "body": b""}), call)
        call.made_ns = time.perf_counter_ns()

    async def _within(self, sending: Awaitable[None], call: Call) -> None:
        with span(call.trace, "send"):
            async with asyncio.timeout(self._timeout_s):
                await sending
