"""Chats and completions: from a request to its answer, at once or as a stream."""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineError
from engine.request import Event
from engine.serve.answering import Answering
from engine.serve.asks import ask_of, refuse_hopeless
from engine.serve.body import read_body, unless_gone
from engine.serve.call import CALL, Call
from engine.serve.desk import Desk
from engine.serve.faults import UNNOTED, refusal_of
from engine.serve.limits import Place
from engine.serve.prompts import Prompted, prompted
from engine.serve.replies import Head, body_of, head_of, stream_of
from engine.serve.sse import WAITING, failed
from engine.serve.stream import EventStream
from engine.serve.tenants import Tenant
from engine.serve.wire import ChatRequest, CompletionRequest, parse_chat, parse_completion
from engine.service.spans import span
from kvstore.errors import StoreError

log = logging.getLogger(__name__)
Asked: TypeAlias = ChatRequest | CompletionRequest


class Generate:
    """The routes that generate."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, parse_chat)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, parse_completion)

    async def _answer(self, request: Request, parse: Callable[[bytes], Asked]) -> Response:
        desk, config = self._desk, self._desk.config
        call: Call = request.scope[CALL]
        with ExitStack() as held:
            with span(call.trace, "http"):
                tenant, place = desk.admit(request, held)
                given = await read_body(request, config.body_bytes, config.body_timeout_s)
                asked = await desk.parsed(lambda body: self._read(parse, body), given, place)
                del given  # the answer may take long
                desk.check_model(asked.model)
            job = Job(desk, tenant, place, asked, call)
            held.callback(job.close)
            events = await unless_gone(request.receive, job.begin())
            if asked.stream:
                release = held.pop_all().close
                return EventStream(job.frames(events), config.send_timeout_s, release)
            body = await unless_gone(request.receive, job.body(events))
            return Response(body, media_type="application/json")

    def _read(self, parse: Callable[[bytes], Asked], body: bytes) -> Asked:
        """What is asked, if it is not hopeless: a million tokens wait for no thread."""
        asked = parse(body)
        refuse_hopeless(asked, self._desk.room)
        return asked


class Job:
    """One request that generates. Close it, whatever became of it."""

    def __init__(self, desk: Desk, tenant: Tenant, place: Place, asked: Asked, call: Call) -> None:
        self._desk, self._tenant, self._place = desk, tenant, place
        self._asked, self._call = asked, call
        self._answering = Answering(desk.service, desk.recorders)
        self._asked_ns = time.perf_counter_ns()

    async def begin(self) -> list[Event]:
        """Submit it, and wait a while for the first events: until then an error can still have a
        status of its own."""
        await self._desk.in_thread(self._submit, self._place)
        return await self._answering.some(self._desk.config.wait_s)

    async def body(self, events: list[Event]) -> bytes:
        """The whole answer, whose first events are there."""
        done = events if self._answering.completion else events + await self._answering.all()
        await self._noted()
        with span(self._call.trace, "detokenise"):
            made = await self._made(done)
        self._call.made_ns = time.perf_counter_ns()
        return made

    async def frames(self, events: list[Event]) -> AsyncGenerator[bytes]:
        """The answer as a stream. It does not raise: its last frame says what went wrong."""
        stream = stream_of(self._asked, self._head(), self._desk.words)
        out = stream.opening()
        try:
            while True:
                with span(self._call.trace, "detokenise"):
                    out += b"".join(stream.push(event) for event in events)
                if self._answering.completion is not None:
                    await self._noted()
                if out or not events:
                    yield out or WAITING
                if self._answering.completion is not None:
                    return
                out, events = b"", await self._answering.some(self._desk.config.wait_s)
        except Exception as error:
            refusal = refusal_of(error)
        self._call.outcome = refusal.fault.code or refusal.fault.type
        yield failed(refusal)

    def close(self) -> None:
        """Give back what it has; what it generated counts against the tenant's limit."""
        done = self._answering.completion
        if done is not None:
            self._call.stats, self._call.outcome = done.stats, done.finish_reason
        self._tenant.tokens.owe(self._answering.generated)
        self._answering.close()

    async def _noted(self) -> None:
        """What was read is on record, if that can be: who has an answer by now, gets it."""
        try:
            await self._answering.settled()
        except (EngineError, StoreError) as error:
            log.error("%s: %s", UNNOTED, error)

    async def _made(self, events: list[Event]) -> bytes:
        def make() -> bytes:
            return body_of(self._asked, self._head(), events, self._desk.words)

        if self._asked.likely is None:
            return make()
        return await self._desk.in_thread(make, self._place)  # some words for every token

    def _head(self) -> Head:
        return head_of(self._asked, created=time.time(), fingerprint=self._desk.fingerprint)

    def _submit(self) -> None:
        """In a thread: make the prompt, and hand it to the service."""
        trace = self._call.trace
        if trace is not None:
            trace.add("http", self._asked_ns, time.perf_counter_ns())  # until there was a thread
        with span(trace, "tokenise"):
            self._start(prompted(self._tenant, self._asked, self._desk.room))

    def _start(self, made: Prompted) -> None:
        desk, tenant = self._desk, self._tenant
        ask = ask_of(
            self._asked,
            made.prompt,
            desk.room,
            blend=desk.engine.config.blend,
            tenant=tenant.name,
            engine=tenant.engine,
            max_priority=tenant.max_priority,
            trace=self._call.trace,
        )
        tenant.tokens.take(made.length)
        try:
            self._answering.start(ask, made.reading)
        except BaseException:
            tenant.tokens.owe(-made.length)
            raise
