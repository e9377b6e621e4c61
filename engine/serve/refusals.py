"""What a client is told instead of an answer, in OpenAI's words and statuses."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

REQUEST = "invalid_request_error"
LONGEST = 500  # characters of a client's own words that an error repeats


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What was wrong.

    Args:
        type: which kind of error.
        param: the field of the request it is about.
        code: which error exactly.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(msgspec.Struct, frozen=True):
    """The body of every answer that is none."""

    error: Fault


class Refusal(Exception):
    """A request that is not served: the status, body and headers of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.fault = Fault(message=message, type=type, param=param, code=code)
        self.headers = dict(headers)

    def body(self) -> bytes:
        """The answer's JSON."""
        return msgspec.json.encode(Error(self.fault))


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """400: the request itself is wrong."""
    return Refusal(400, message, param=param, code=code)


def unsupported(param: str, accepted: str) -> Refusal:
    """400: a field of OpenAI's that has one value here."""
    message = f"Unsupported value for '{param}': only {accepted} is supported here."
    return Refusal(400, message, param=param, code="unsupported_value")


def too_long(message: str, param: str | None) -> Refusal:
    """400: prompt and answer do not fit."""
    return Refusal(400, message, param=param, code="context_length_exceeded")


def unauthorized(message: str) -> Refusal:
    """401: no key, or one that nobody has. The message must not repeat the key."""
    return Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def forbidden(message: str) -> Refusal:
    """403: the key is good, but not for this."""
    return Refusal(403, message, code="forbidden")


def no_model(name: str) -> Refusal:
    """404: another model is served here."""
    message = f"The model {shown(name)} does not exist or you do not have access to it."
    return Refusal(404, message, param="model", code="model_not_found")


def no_document(name: str) -> Refusal:
    """404: no such document, or somebody else's, which is the same answer."""
    return Refusal(404, f"There is no document {shown(name)}.", param="id", code="not_found")


def no_route(method: str, path: str) -> Refusal:
    """404: nothing is at this address."""
    return Refusal(404, f"Invalid URL ({shown(method)} {shown(path)})", code="unknown_url")


def wrong_method(method: str, path: str, allowed: str) -> Refusal:
    """405, with what is allowed, as in "GET, HEAD"."""
    message = f"Not allowed to {shown(method)} on {shown(path)}: allowed are {allowed}."
    return Refusal(405, message, code="method_not_supported", headers={"allow": allowed})


def timed_out(message: str) -> Refusal:
    """408: the client's own deadline passed, so it should not try again by itself."""
    headers = {"x-should-retry": "false"}  # what OpenAI's clients look for
    return Refusal(408, message, type="timeout", code="deadline_exceeded", headers=headers)


def too_large(limit_bytes: int) -> Refusal:
    """413: the body has too many bytes."""
    message = f"The request body is too large: at most {limit_bytes} bytes are taken."
    return Refusal(413, message, code="request_too_large")


def wrong_media_type(given: str) -> Refusal:
    """415: the body is not said to be JSON."""
    message = f"The content type must be application/json, got {shown(given)}."
    return Refusal(415, message, code="unsupported_media_type")


def wrong_encoding(given: str) -> Refusal:
    """415: the body is compressed."""
    message = f"A body is taken as it is, not in the content encoding {shown(given)}."
    headers = {"accept-encoding": "identity"}
    return Refusal(415, message, code="unsupported_media_type", headers=headers)


def rate_limited(message: str, retry_after_s: float, *, type: str = "requests") -> Refusal:
    """429: too much at once, or too often. OpenAI's types are "requests" and "tokens"."""
    headers = _later(retry_after_s)
    return Refusal(429, message, type=type, code="rate_limit_exceeded", headers=headers)


def over_quota(message: str) -> Refusal:
    """429: a quota is used up; waiting does not help."""
    kind = "insufficient_quota"
    return Refusal(429, message, type=kind, code=kind, headers={"x-should-retry": "false"})


def crashed() -> Refusal:
    """500: our fault. What it was stands in the log, not here."""
    return Refusal(
        500,
        "The server had an error while processing your request. Sorry about that!",
        type="server_error",
        code="internal_error",
    )


def overloaded(message: str, retry_after_s: float = 1.0, *, code: str = "overloaded") -> Refusal:
    """503: not now."""
    headers = _later(retry_after_s)
    return Refusal(503, message, type="server_error", code=code, headers=headers)


def shown(words: str) -> str:
    """A client's own words in a message: on one line, and not all of a megabyte."""
    cut = words if len(words) <= LONGEST else words[:LONGEST] + "…"
    return f"'{cut.encode('unicode_escape').decode() if not cut.isprintable() else cut}'"


def _later(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}
