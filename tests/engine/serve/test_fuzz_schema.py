"""The server does what its OpenAPI document says, whatever it is asked: schemathesis' word."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from engine.serve.schema import openapi
from tests.engine.serve.server import LIMIT_S, Running, running

SCHEMA = schemathesis.openapi.from_dict(openapi(keys=False))
OPERATIONS = {f"{x.ok().method} {x.ok().path}": x.ok() for x in SCHEMA.get_all_operations()}
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
MESSAGES = [{"role": "user", "content": "One"}]
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
QUICK = settings(max_examples=6, suppress_health_check=QUIET)
LONG = settings(max_examples=300, suppress_health_check=QUIET)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_new_tokens=3, max_prompt_tokens=200) as made:
        yield made


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        yield made


def ask(server: Running, session: requests.Session, name: str, data: st.DataObject) -> None:
    """One case of an operation, right or wrong. A good name of a model is made that of ours, which
    half of the time is all that stands between a request and its answer.
    """
    mode = data.draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
    case = data.draw(OPERATIONS[name].as_strategy(generation_mode=mode))
    if isinstance(case.body, dict) and good_name(case.body.get("model")):
        case.body["model"] = data.draw(st.sampled_from([server.model, "another"]))
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    response = case.call(base_url=server.url, session=session, timeout=LIMIT_S)
    assert response.status_code < 500 or response.status_code == 503, response.content
    case.validate_response(response, checks=checks)


def good_name(name: Any) -> bool:
    return isinstance(name, str) and 1 <= len(name) <= 256


@pytest.mark.parametrize("name", OPERATIONS)
@QUICK
@given(data=st.data())
def test_answers_are_those_of_the_document(server, session, name, data):
    ask(server, session, name, data)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_are_those_of_the_document(server, session, path):
    asked = {"prompt": "One"} if path == "/v1/completions" else {"messages": MESSAGES}
    body = asked | {"model": server.model, "stream": True, "max_tokens": 2}
    case = OPERATIONS[f"post {path}"].Case(body=body, media_type="application/json")
    response = case.call(base_url=server.url, session=session, timeout=LIMIT_S)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(response, checks=CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
@LONG
@given(data=st.data())
def test_many_answers_are_those_of_the_document(server, session, name, data):
    ask(server, session, name, data)
