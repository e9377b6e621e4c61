"""One HTTP request from its first byte to its last: its name, its numbers, its line in the log."""

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ServerStopping
from engine.request import RequestStats
from engine.serve.failures import refused
from engine.serve.observed import Observed
from engine.serve.protocol import ABORT
from engine.serve.refusals import Refusal, crashed
from engine.service.spans import Trace

log = logging.getLogger(__name__)
access = logging.getLogger("headrace.access")

CALL = "headrace.call"  # in a request's scope
GONE = 499  # the client left before it had its answer; only logged
GOOD_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(slots=True, eq=False)
class Call:
    """What is known of a request while it is served. No prompt, key or text of a document.

    Args:
        route: the pattern that its path fits; "" where nothing does.
        status: of the answer; 0 until it begins.
        tenant: None until it is known.
        outcome: how a request of a model ended: "stop", "length", or an error's code.
        dropped: the client was, because it read too slowly or had gone.
        stats: of its completion.
        made_ns: when nothing was left but to send what there is, and to end.
    """

    id: str
    method: str
    trace: Trace | None = None
    route: str = ""
    status: int = 0
    tenant: str | None = None
    outcome: str = ""
    dropped: Literal["slow", "gone"] | None = None
    stats: RequestStats | None = None
    started: float = field(default_factory=time.perf_counter)
    made_ns: int | None = None
    total_s: float = 0.0

    def line(self) -> bytes:
        """The request in the access log: one JSON object."""
        said = {
            "time": round(time.time(), 3), "id": self.id, "method": self.method,
            "route": self.route, "status": self.status, "tenant": self.tenant or "",
            "total_s": round(self.total_s, 4),
        }  # fmt: skip
        if self.outcome or self.dropped:
            said["outcome"] = self.dropped or self.outcome
        if self.trace is not None:
            said["trace"] = self.trace.id
        if self.stats is not None:
            said |= {
                "prompt_tokens": self.stats.prompt_tokens,
                "cached_tokens": self.stats.cached_tokens,
                "new_tokens": self.stats.new_tokens,
                "ttft_s": round(self.stats.ttft_s, 4),
            }
        return msgspec.json.encode(said)


class Door:
    """The outermost part of the application: every request comes in here, and is accounted for.

    Args:
        observed: is told of the requests that make work, which are those that POST.
    """

    def __init__(self, app: ASGIApp, observed: Observed) -> None:
        self._app, self._observed = app, observed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server is started without lifespan and websockets"
        call = scope[CALL] = self._call(scope)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = call.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = call.id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except asyncio.CancelledError:  # the server ends, and waits for nobody any more
            await self._give_up(scope, receive, send_named, refused(ServerStopping()))
        except Exception:
            log.exception("request %s failed", call.id)
            await self._give_up(scope, receive, send_named, crashed())
        finally:
            self._end(call)

    def _call(self, scope: Scope) -> Call:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id_ = given if GOOD_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        trace = None
        if scope["method"] == "POST":
            trace = self._observed.begin("POST", headers.get("traceparent"))
        return Call(id_, scope["method"], trace)

    async def _give_up(self, scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
        call: Call = scope[CALL]
        if call.status:
            scope[ABORT]()  # the client must not take it for a whole answer
            return
        call.outcome = refusal.fault.code or ""
        answer = Response(refusal.body(), refusal.status, refusal.headers, "application/json")
        await answer(scope, receive, send)

    def _end(self, call: Call) -> None:
        call.total_s = time.perf_counter() - call.started
        call.status = call.status or GONE
        if call.trace is not None:
            call.trace.name = f"{call.method} {call.route}"
            call.trace.attributes["request_id"] = call.id
            if call.made_ns is not None:
                call.trace.add("send", call.made_ns, time.perf_counter_ns())
            self._observed.finished(
                call.trace, status=call.status, tenant=call.tenant, stats=call.stats
            )
            if self._observed.due():
                asyncio.get_running_loop().run_in_executor(None, self._observed.note)
        if call.dropped is not None:
            self._observed.dropped(call.dropped)
        access.info("%s", call.line().decode())
