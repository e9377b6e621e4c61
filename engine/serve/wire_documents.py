"""Documents and models on the wire, in the shapes that OpenAI gives to lists of things."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.serve.fields import Wire
from engine.serve.reading import read
from engine.serve.refusals import invalid, shown

PAGE = 100  # documents in a list, where nothing is said
LARGEST_PAGE = 1000

# an id stands in paths, so it has nothing that a path would change; `$` alone allows a line's end
Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$(?!\n)")]


class NewDocument(Wire, frozen=True, kw_only=True):
    """A text to be read. Without an id it gets one that follows from title and text; with that of
    another document it takes its place."""

    text: Annotated[str, Meta(min_length=1)]
    id: Id | None = None
    title: Annotated[str, Meta(max_length=1000)] | None = None


class DocumentsRequest(Wire, frozen=True, kw_only=True):
    """All of them are read, or none."""

    documents: Annotated[list[NewDocument], Meta(min_length=1, max_length=1000)]


class DocumentObject(msgspec.Struct, frozen=True, kw_only=True):
    """A document that was read.

    Args:
        chunks: their ids, which a chat's `documents` may name too.
        tokens: of all chunks.
    """

    id: str
    object: Literal["document"] = "document"
    title: str
    chunks: list[str]
    tokens: int


class DocumentList(msgspec.Struct, frozen=True, kw_only=True):
    """Some documents, in the order in which they came."""

    object: Literal["list"] = "list"
    data: list[DocumentObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DocumentDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A document is gone, and the KV of its chunks with it."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: bool = True


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """A name that the model answers to."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server lives, and whether it takes requests."""

    status: Literal["ok", "draining"]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Which documents of a list: so many, behind the one with an id."""

    limit: int = PAGE
    after: str | None = None


def parse_documents(body: bytes) -> DocumentsRequest:
    """The request of POST /v1/documents. Refusal for any other."""
    request = read(body, DocumentsRequest, {})
    ids = [document.id for document in request.documents if document.id is not None]
    if len(set(ids)) < len(ids):
        twice = next(id_ for number, id_ in enumerate(ids) if id_ in ids[:number])
        raise invalid(f"Two documents have the id {shown(twice)}.", "documents", "invalid_value")
    return request


def parse_page(query: Mapping[str, str]) -> Page:
    """The page that a query asks for. Refusal where it is none."""
    limit = query.get("limit", str(PAGE))
    if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= LARGEST_PAGE:
        message = f"'limit' is a number from 1 to {LARGEST_PAGE}, got {shown(limit)}."
        raise invalid(message, "limit", "invalid_value")
    return Page(limit=int(limit), after=query.get("after"))


def page_of(documents: Sequence[DocumentObject], page: Page) -> DocumentList:
    """A part of all documents. Refusal where it should begin behind one that is not there."""
    start = 0
    if page.after is not None:
        ids = [document.id for document in documents]
        if page.after not in ids:
            message = f"'after' is the id of a document, got {shown(page.after)}."
            raise invalid(message, "after", "invalid_value")
        start = ids.index(page.after) + 1
    data = list(documents[start : start + page.limit])
    return DocumentList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=start + len(data) < len(documents),
    )
