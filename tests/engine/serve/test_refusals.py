"""Errors: the right status, and nothing that is the server's own business."""

import json

import pytest

from engine.errors import (
    Busy,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    ModelError,
    PromptError,
    PromptTooLong,
    ServerStopping,
)
from engine.serve import refusals
from engine.serve.failures import refused
from engine.serve.refusals import Refusal, shown
from kvstore.errors import PoolFull, StoreError

SECRET = "/srv/keys/secret"


def test_every_kind_has_its_status_and_code():
    made = [
        (refusals.invalid("m"), 400, None),
        (refusals.unsupported("n", "1"), 400, "unsupported_value"),
        (refusals.too_long("m", "prompt"), 400, "context_length_exceeded"),
        (refusals.unauthorized("m"), 401, "invalid_api_key"),
        (refusals.forbidden("m"), 403, "forbidden"),
        (refusals.no_model("m"), 404, "model_not_found"),
        (refusals.no_document("m"), 404, "not_found"),
        (refusals.no_route("GET", "/x"), 404, "unknown_url"),
        (refusals.wrong_method("PUT", "/x", "GET"), 405, "method_not_supported"),
        (refusals.timed_out("m"), 408, "deadline_exceeded"),
        (refusals.too_large(5), 413, "request_too_large"),
        (refusals.wrong_media_type("text/plain"), 415, "unsupported_media_type"),
        (refusals.wrong_encoding("gzip"), 415, "unsupported_media_type"),
        (refusals.rate_limited("m", 1.0), 429, "rate_limit_exceeded"),
        (refusals.over_quota("m"), 429, "insufficient_quota"),
        (refusals.crashed(), 500, "internal_error"),
        (refusals.overloaded("m"), 503, "overloaded"),
    ]
    for refusal, status, code in made:
        body = json.loads(refusal.body())
        assert list(body["error"]) == ["message", "type", "param", "code"]
        assert (refusal.status, body["error"]["code"]) == (status, code)


def test_headers_say_what_to_do():
    assert refusals.rate_limited("m", 0.2).headers == {"retry-after": "1"}
    assert refusals.rate_limited("m", 2.1).headers == {"retry-after": "3"}
    assert refusals.wrong_method("PUT", "/x", "GET, HEAD").headers == {"allow": "GET, HEAD"}
    assert refusals.wrong_encoding("br").headers == {"accept-encoding": "identity"}
    assert refusals.unauthorized("m").headers == {"www-authenticate": "Bearer"}


def test_a_refusal_may_get_headers_of_its_own():
    refusals.crashed().headers["x"] = "1"
    assert refusals.crashed().headers == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PromptError("token id 9 is out of range"), 400),
        (PromptTooLong(f"cache_bytes is {SECRET}: raise it"), 400),
        (DeadlineExceeded("x"), 408),
        (Busy("x"), 503),
        (ServerStopping("x"), 503),
        (PoolFull("x"), 503),
        (Cancelled("x"), 500),
        (ConfigError(SECRET), 500),
        (ModelError(SECRET), 500),
        (EngineError(SECRET), 500),
        (StoreError(SECRET), 500),
        (ValueError(SECRET), 500),
        (RuntimeError(SECRET), 500),
    ],
)
def test_whatever_fails_has_an_answer(error, status):
    refusal = refused(error)
    assert refusal.status == status
    assert SECRET not in refusal.body().decode()
    if isinstance(error, PromptTooLong):
        assert refusal.fault.code == "context_length_exceeded"
    elif isinstance(error, PromptError):
        assert refusal.fault.message == str(error)


def test_a_refusal_stays_what_it_is():
    refusal = Refusal(418, "tea")
    assert refused(refusal) is refusal


def test_words_of_a_client_are_shown_on_one_line_and_not_all():
    assert shown("m") == "'m'"
    assert shown("ä€") == "'ä€'"
    assert shown("a\r\nb\x1b") == r"'a\r\nb\x1b'"
    assert len(shown("x" * 10_000)) < refusals.LONGEST + 10
