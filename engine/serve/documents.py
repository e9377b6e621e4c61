"""Documents over HTTP: added, listed, deleted; each tenant has its own."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.blend.segments import Tokens
from engine.errors import ServerStopping
from engine.rag.catalogue import Document
from engine.rag.library import Unknown
from engine.rag.shelf import Shelf
from engine.serve.body import read_body, unless_gone
from engine.serve.call import CALL, Call
from engine.serve.desk import Desk
from engine.serve.faults import logged
from engine.serve.limits import Place
from engine.serve.refusals import Refusal, no_document, over_quota
from engine.serve.tenants import Tenant
from engine.serve.wire_documents import (
    DocumentDeleted,
    DocumentList,
    DocumentObject,
    NewDocument,
    page_of,
    parse_documents,
    parse_page,
)
from engine.service.spans import span
from engine.slices import Slices

T = TypeVar("T")
UNDELETED = "what was deleted while documents were added may have left KV"


class Documents:
    """The routes of a tenant's documents."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def add(self, request: Request) -> Response:
        """POST /v1/documents: answered when the KV of all is stored."""
        desk, config = self._desk, self._desk.config
        call: Call = request.scope[CALL]
        with ExitStack() as held:
            with span(call.trace, "http"):
                tenant, place = desk.admit(request, held)
                body = await read_body(request, config.body_bytes, config.body_timeout_s)
                asked = await desk.parsed(parse_documents, body, place)
            adding = Adding(desk, tenant, place, call)
            documents = await unless_gone(request.receive, adding.add(asked.documents))
            return _json(_listed(documents))

    async def list(self, request: Request) -> Response:
        """GET /v1/documents."""
        with ExitStack() as held:
            shelf, place = self._admitted(request, held)
            page = parse_page(request.query_params)

            def listed() -> Response:
                return _json(page_of([_object(document) for document in shelf.documents()], page))

            return await self._desk.in_thread(listed, place)

    async def one(self, request: Request) -> Response:
        """GET /v1/documents/{id}."""
        id_ = request.path_params["id"]
        with ExitStack() as held:
            shelf, place = self._admitted(request, held)
            try:
                return _json(
                    _object(await self._desk.in_thread(lambda: shelf.document(id_), place))
                )
            except Unknown:
                raise no_document(id_) from None

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/documents/{id}."""
        id_ = request.path_params["id"]
        with ExitStack() as held:
            shelf, place = self._admitted(request, held)
            try:
                await self._desk.kept(lambda: shelf.delete(id_), place)
            except Unknown:
                raise no_document(id_) from None
            return _json(DocumentDeleted(id=id_))

    def _admitted(self, request: Request, held: ExitStack) -> tuple[Shelf, Place]:
        """A tenant's documents, if it may ask for something now, and the place that this takes."""
        tenant, place = self._desk.admit(request, held)
        return shelf_of(tenant), place


class Adding:
    """Documents on their way in."""

    def __init__(self, desk: Desk, tenant: Tenant, place: Place, call: Call) -> None:
        self._desk, self._tenant, self._place, self._call = desk, tenant, place, call
        self._shelf = shelf_of(tenant)

    async def add(self, given: Sequence[NewDocument]) -> Sequence[Document]:
        """Read them, put them on record, and compute their KV between the steps of requests.

        Cancelled, or without room for the KV, they stay on record: what is missing is computed by
        the first request that needs it.
        """
        with span(self._call.trace, "tokenise"):
            sources = [_source(document) for document in given]
            documents = await self._desk.read(lambda: self._shelf.read(sources), self._place)
        async with self._tenant.adding:
            admitting = asyncio.ensure_future(self._admitted(documents))
            try:
                chunks = await asyncio.shield(admitting)
            finally:  # who leaves meanwhile lets nobody in before it is known what there is
                await asyncio.wait({admitting})
                if not admitting.cancelled():
                    admitting.exception()  # told, or nobody's any more
        with span(self._call.trace, "prefill"):
            await self._compute(documents, chunks)
        return documents

    async def _admitted(self, documents: Sequence[Document]) -> list[Tokens]:
        """Put on record what the quota and the rate allow, while there is somebody to read it."""
        if self._desk.service.draining:
            raise ServerStopping("the server is stopping: it takes no more documents")
        await self._recorded(lambda: self._check_quota(documents))
        self._tenant.tokens.take(sum(document.tokens for document in documents))
        return await self._recorded(lambda: self._shelf.add(documents))

    async def _compute(self, documents: Sequence[Document], chunks: Sequence[Tokens]) -> None:
        left = threading.Event()
        engine, prefix, owner = self._tenant.engine, self._shelf.prefix, self._tenant.name
        service, recorders = self._desk.service, self._desk.recorders

        def noted() -> None:
            self._shelf.stored(documents)

        def work() -> Slices[None]:
            return _until(left, lambda: engine.precompute_slices(chunks, prefix))

        def begin() -> "Future[None]":
            future = service.background(work, owner)
            future.add_done_callback(lambda _: recorders.submit(logged, noted, UNDELETED))
            return future

        try:
            future = await self._recorded(begin)  # the service has a door
            self._place.until(future)  # who leaves has its place until this is off the queue
            done = asyncio.wrap_future(future)
            await asyncio.wait({done})
        finally:
            left.set()
        if done.cancelled():
            raise ServerStopping("the server is stopping: not all KV was computed")
        done.result()
        # a slice would hold up who is answered; what could not be written is computed when needed
        await self._desk.kept(engine.store.settle, self._place)

    async def _recorded(self, work: Callable[[], T]) -> T:
        return await self._desk.recorded(work, self._place)

    def _check_quota(self, documents: Sequence[Document]) -> None:
        quota = self._tenant.document_tokens
        if quota is None:
            return
        after = {
            document.id: document.tokens for document in (*self._shelf.documents(), *documents)
        }
        needed = sum(after.values())
        if needed > quota:
            raise over_quota(
                f"All documents of this key may have {quota} tokens, with these they would have "
                f"{needed}: delete some first."
            )


def _until(left: threading.Event, make: Callable[[], Slices[None]]) -> Slices[None]:
    """The same, but no more of it once nobody waits for it."""
    if left.is_set():
        return
    with closing(make()) as slices:
        for cost in slices:
            yield cost
            if left.is_set():
                return


def shelf_of(tenant: Tenant) -> Shelf:
    """A tenant's documents. Refusal where the model cannot have any."""
    if tenant.shelf is None:
        raise Refusal(403, "This model cannot reuse documents.", code="forbidden")
    return tenant.shelf


def _source(document: NewDocument) -> Mapping[str, str]:
    source = {"text": document.text, "title": document.title or ""}
    return source if document.id is None else source | {"id": document.id}


def _object(document: Document) -> DocumentObject:
    chunks = [chunk.id for chunk in document.chunks]
    return DocumentObject(
        id=document.id, title=document.title, chunks=chunks, tokens=document.tokens
    )


def _listed(documents: Sequence[Document]) -> DocumentList:
    data = [_object(document) for document in documents]
    return DocumentList(data=data, first_id=data[0].id, last_id=data[-1].id, has_more=False)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
