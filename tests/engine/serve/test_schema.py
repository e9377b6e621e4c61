"""The OpenAPI document: valid, complete, and of one mind with the parsers."""

import json
import re

import jsonschema_rs
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.serve.refusals import Refusal, crashed
from engine.serve.replies import Head, body_of, stream_of
from engine.serve.schema import openapi
from engine.serve.token_text import TokenText
from engine.serve.wire import parse_chat, parse_completion
from engine.serve.wire_documents import parse_documents
from tests.engine.serve.told import ids, of_bytes, told

ROUTES = {
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get"},
    "/v1/completions": {"post"},
    "/v1/chat/completions": {"post"},
    "/v1/documents": {"get", "post"},
    "/v1/documents/{id}": {"get", "delete"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
    "/": {"get"},
    "/stats": {"get"},
    "/traces": {"get"},
}
DOCUMENT = openapi(keys=False)


def validator(name):
    """Of a component, which may refer to others."""
    schemas = {"components": DOCUMENT["components"], "$ref": f"#/components/schemas/{name}"}
    return jsonschema_rs.Draft202012Validator(schemas)


def test_all_routes_are_there():
    found = {
        path: set(item) & {"get", "post", "delete"} for path, item in DOCUMENT["paths"].items()
    }
    assert found == ROUTES


def test_schemathesis_reads_it():
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    found = [result.ok().label for result in schema.get_all_operations()]
    assert len(found) == sum(map(len, ROUTES.values()))


def test_every_reference_is_there_and_every_schema_is_one():
    text = json.dumps(DOCUMENT)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(DOCUMENT["components"]["schemas"])
    for name in DOCUMENT["components"]["schemas"]:
        validator(name)


def test_every_operation_says_how_it_may_fail():
    operations = [
        item[method] for path, item in DOCUMENT["paths"].items() for method in ROUTES[path]
    ]
    for operation in operations:
        assert {"200", "400", "401", "403", "405", "408", "429", "500", "503"} <= set(
            operation["responses"]
        )
        if "requestBody" in operation:
            assert {"413", "415"} <= set(operation["responses"])
    assert len({operation["operationId"] for operation in operations}) == len(operations)


def test_a_key_is_part_of_it_where_one_is_needed():
    assert "security" not in DOCUMENT
    with_keys = openapi(keys=True)
    assert with_keys["security"] == [{"key": []}]
    assert with_keys["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert with_keys["paths"]["/healthz"]["get"]["security"] == []


def test_answers_are_as_described():
    words, head = TokenText(of_bytes()), Head(id="1", created=1, model="m", fingerprint="f")
    events = told(of_bytes(), ids(of_bytes(), "ab€"), top=((0, -1.0),))
    messages = [{"role": "user", "content": "x"}]
    chat = {"model": "m", "messages": messages, "logprobs": True, "top_logprobs": 1}
    text = {"model": "m", "prompt": "x", "logprobs": 1}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    for parse, ask, whole, chunk in [
        (parse_chat, chat, "Chat", "ChatChunk"),
        (parse_completion, text, "Text", "Text"),
    ]:
        request = parse(json.dumps(ask).encode())
        validator(whole).validate(json.loads(body_of(request, head, events, words)))
        request = parse(json.dumps(ask | streaming).encode())
        stream = stream_of(request, head, words)
        sent = stream.opening() + b"".join(map(stream.push, events))
        for frame in sent.split(b"\n\n")[:-2]:
            validator(chunk).validate(json.loads(frame.removeprefix(b"data: ")))
    validator("Error").validate(json.loads(crashed().body()))


ASKED = {
    "ChatRequest": ("/v1/chat/completions", parse_chat),
    "CompletionRequest": ("/v1/completions", parse_completion),
    "DocumentsRequest": ("/v1/documents", parse_documents),
}
# what a schema cannot say: two fields that do not go together
TOGETHER = {"messages", "stream_options", "top_logprobs", "blend", "max_tokens", "documents"}


def edges(schema):
    """Values at the edges of what a schema allows, of the few kinds that ours has."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return [value for part in schema["anyOf"] for value in edges(part)]
    if "const" in schema or "enum" in schema:
        return schema.get("enum") or [schema["const"]]
    match schema.get("type"):
        case "integer":
            return [schema["minimum"], schema["maximum"], float(max(schema["minimum"], 0))]
        case "number":
            return [schema.get("minimum", 1e-9), schema["maximum"], int(schema["maximum"])]
        case "string":
            fits = "pattern" not in schema
            longest = schema.get("maxLength", 128)
            return ["x" * schema.get("minLength", 1), ("€" if fits else "x") * longest]
        case "boolean":
            return [True, False]
        case "null":
            return [None]
        case "array":
            parts = edges(schema["items"]) if "items" in schema else [5]
            sizes = schema.get("minItems", 0), min(schema.get("maxItems", 5), 5)
            return [[part] * size for part in parts for size in sizes]
        case "object" if "properties" in schema:
            names = schema["required"]
            least = {name: edges(schema["properties"][name])[0] for name in names}
            every = {name: edges(part)[-1] for name, part in schema["properties"].items()}
            return [least, least | every]
        case "object":
            return [{}] if schema.get("maxProperties") == 0 else [{}, {"a": "b"}]
    raise AssertionError(f"a kind of schema that is new here: {schema}")


def required(name):
    """The smallest request."""
    return {"model": "m"} | {
        "ChatRequest": {"messages": [{"role": "user", "content": "x"}]},
        "CompletionRequest": {"prompt": "x"},
    }[name]


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
def test_the_edges_of_what_the_schema_allows_are_parsed(name):
    companions = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True},
                  "blend": {"documents": ["x"]}}  # fmt: skip
    tried = 0
    for field, schema in DOCUMENT["components"]["schemas"][name]["properties"].items():
        for value in edges(schema):
            if field == "messages":  # an assistant alone says nothing
                silent = {"role": "assistant"}
                value = [one | (silent if one["content"] is None else {}) for one in value]
            asked = required(name) | companions.get(field, {}) | {field: value}
            validator(name).validate(asked)
            ASKED[name][1](json.dumps(asked).encode())
            tried += 1
    assert tried > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
@settings(suppress_health_check=list(HealthCheck), max_examples=25)
@given(data=st.data())
def test_what_the_schema_allows_is_parsed(name, data):
    path, parse = ASKED[name]
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path]["POST"]
    drawn = data.draw(operation.as_strategy()).body
    try:
        parse(json.dumps(drawn).encode())
    except Refusal as refusal:
        said = refusal.fault
    else:
        return
    field = re.sub(r"^messages\[\d+\]\.content$", "messages", str(said.param))
    assert field in TOGETHER, said
    assert TOGETHER & drawn.keys()


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
@given(data=st.data())
def test_what_is_parsed_the_schema_allows(name, data):
    """One field after the other, with values that its neighbours have."""
    fields = sorted(DOCUMENT["components"]["schemas"][name]["properties"])
    values = st.sampled_from(
        [None, True, False, 0, 1, 2, -1, 0.5, "", "x", "none", "auto", [], ["x"], [1], [[]], [[1]],
         ["x", "y"], {}, {"type": "text"}, {"include_usage": True}, {"a": "b"}, {"share": 2}]
    )  # fmt: skip
    asked = required(name) | {data.draw(st.sampled_from(fields)): data.draw(values)}
    try:
        ASKED[name][1](json.dumps(asked).encode())
    except Refusal:
        return
    validator(name).validate(asked)


def test_the_document_is_json():
    assert json.loads(msgspec.json.encode(DOCUMENT)) == json.loads(json.dumps(DOCUMENT))
