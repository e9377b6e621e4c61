"""The OpenAPI document, made of the structs that parse requests and encode answers."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from engine.serve.answers import Chat, ChatChunk, Text
from engine.serve.fields import TokenId
from engine.serve.refusals import Error
from engine.serve.report import StatusReport, TracesReport
from engine.serve.sse import MEDIA_TYPE
from engine.serve.wire import ChatRequest, CompletionRequest
from engine.serve.wire_documents import (
    LARGEST_PAGE,
    PAGE,
    DocumentDeleted,
    DocumentList,
    DocumentObject,
    DocumentsRequest,
    Health,
    ModelList,
    ModelObject,
)

JSON = "application/json"
REF = "#/components/schemas/{name}"
SHAPES = (
    ChatRequest, CompletionRequest, DocumentsRequest, Chat, ChatChunk, Text, Error, StatusReport,
    TracesReport, DocumentDeleted, DocumentList, DocumentObject, Health, ModelList, ModelObject,
)  # fmt: skip

ERRORS = {
    400: "The request is wrong: `param` says which field, `code` in which way.",
    401: "There is no such API key.",
    403: "Not allowed.",
    404: "There is no such model, document or address.",
    405: "Another method is needed: see the header Allow.",
    408: "The request's `timeout_s` is over, or its body did not arrive in time.",
    413: "The body has too many bytes.",
    415: "The body is not said to be JSON.",
    429: "Too many requests or tokens, or a quota is used up: see the header Retry-After.",
    500: "An error of the server's.",
    503: "The server has too much to do, or is about to stop: see the header Retry-After.",
}
ALWAYS = (400, 401, 403, 405, 408, 429, 500, 503)

Schema = dict[str, Any]


def openapi(*, keys: bool) -> Schema:
    """The document, version 3.1.

    Args:
        keys: whether the server wants an API key.
    """
    _, components = msgspec.json.schema_components(SHAPES, ref_template=REF)
    components["CompletionRequest"]["properties"]["prompt"] = _prompt()
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": _version(),
            "description": "Long-context inference behind OpenAI's interface.",
        },
        "paths": _models() | _generation() | _documents() | _watching(),
        "components": {"schemas": components},
    }
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in ("/", "/healthz", "/readyz"):
            document["paths"][path]["get"]["security"] = []
    return document


def _models() -> Schema:
    return {
        "/v1/models": {"get": _operation("listModels", "The names of the model.", "ModelList")},
        "/v1/models/{model}": {
            "parameters": [_in_path("model")],
            "get": _operation("getModel", "One name of the model.", "ModelObject", errors=[404]),
        },
    }


def _generation() -> Schema:
    chat = _operation(
        "createChatCompletion",
        "Continue a conversation; `documents` are put in front of its first question, and their KV "
        "is reused. With `stream`, events whose data are `ChatChunk`, then `[DONE]`.",
        "Chat",
        body="ChatRequest",
        errors=[404],
    )
    text = _operation(
        "createCompletion",
        "Continue a text. With `stream`, events whose data are `Text`, then `[DONE]`.",
        "Text",
        body="CompletionRequest",
        errors=[404],
    )
    for operation in (chat, text):
        operation["responses"]["200"]["content"][MEDIA_TYPE] = _schema(_event())
    return {"/v1/chat/completions": {"post": chat}, "/v1/completions": {"post": text}}


def _documents() -> Schema:
    add = _operation(
        "addDocuments",
        "Read documents; answered when their KV is stored. One with a known id replaces it.",
        "DocumentList",
        body="DocumentsRequest",
        errors=[404],
    )
    listed = _operation("listDocuments", "Documents in the order of adding.", "DocumentList")
    number = {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": PAGE}
    listed["parameters"] = [
        {"name": "limit", "in": "query", "schema": number},
        {"name": "after", "in": "query", "schema": {"type": "string"}},
    ]
    shown = _operation("getDocument", "One document.", "DocumentObject", errors=[404])
    gone = _operation(
        "deleteDocument",
        "Forget a document, and the KV of chunks that no other one has.",
        "DocumentDeleted",
        errors=[404],
    )
    return {
        "/v1/documents": {"get": listed, "post": add},
        "/v1/documents/{id}": {"parameters": [_in_path("id")], "get": shown, "delete": gone},
    }


def _watching() -> Schema:
    ready = _operation("ready", "Whether the server takes requests.", "Health")
    ready["responses"]["503"] = _response("It is about to stop.", "Health")
    traces = _operation("traces", "Where the time of the last requests went.", "TracesReport")
    traces["parameters"] = [
        {"name": "id", "in": "query", "schema": {"type": "string"}},
        {"name": "format", "in": "query", "schema": {"type": "string", "enum": ["otlp"]}},
    ]
    json = {"anyOf": [_ref("TracesReport"), {"type": "object", "required": ["resourceSpans"]}]}
    traces["responses"]["200"]["content"][JSON] = _schema(json)
    return {
        "/healthz": {"get": _operation("alive", "Whether the process lives.", "Health")},
        "/readyz": {"get": ready},
        "/metrics": {"get": _text("metrics", "Numbers for Prometheus.", "text/plain")},
        "/stats": {"get": _operation("stats", "How the server is doing.", "StatusReport")},
        "/traces": {"get": traces},
        "/": {"get": _text("status", "A page that shows `/stats`.", "text/html")},
    }


def _operation(
    name: str, summary: str, answer: str, *, body: str | None = None, errors: Sequence[int] = ()
) -> Schema:
    """An operation that takes and gives JSON."""
    bodies = (413, 415) if body is not None else ()
    failed = {
        str(status): _response(ERRORS[status], "Error")
        for status in sorted({*ALWAYS, *errors, *bodies})
    }
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _response("Done.", answer)} | failed,
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: _schema(_ref(body))}}
    return operation


def _text(name: str, summary: str, media_type: str) -> Schema:
    """An operation that gives text."""
    operation = _operation(name, summary, "Error")
    operation["responses"]["200"]["content"] = {media_type: _schema({"type": "string"})}
    return operation


def _response(description: str, name: str) -> Schema:
    return {"description": description, "content": {JSON: _schema(_ref(name))}}


def _event() -> Schema:
    """One of a stream, as OpenAPI before 3.2 has it: its data is JSON, or `[DONE]` at the end."""
    return {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


def _in_path(name: str) -> Schema:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _prompt() -> Schema:
    """What a struct cannot say: one prompt, in any of its forms."""
    tokens = {
        "type": "array",
        "items": msgspec.json.schema(TokenId),
        "minItems": 1,
    }
    one = {"type": "array", "minItems": 1, "maxItems": 1}
    text = {"type": "string"}
    return {"anyOf": [text, tokens, one | {"items": text}, one | {"items": tokens}]}


def _schema(schema: Schema) -> Schema:
    return {"schema": schema}


def _ref(name: str) -> Schema:
    return {"$ref": REF.format(name=name)}


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0"
