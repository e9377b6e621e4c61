"""Whatever comes in, parsing gives a request or a refusal, soon."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.serve.refusals import LONGEST, Refusal
from engine.serve.wire import ChatRequest, CompletionRequest, parse_chat, parse_completion
from engine.serve.wire_documents import DocumentsRequest, parse_documents

HELLO = [{"role": "user", "content": "Hello"}]
PARSERS = [parse_chat, parse_completion, parse_documents]


def refused(parse, body):
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert caught.value.status == 400
    return json.loads(caught.value.body())["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"x", b"{}x", b"\xff", b'{"model": "\xff"}', b'{"model": "\xed\xa0\x80"}',
        rb'{"model": "\ud800"}', rb'{"model": "\udc00 and more of it"}', rb'{"\ud800": "a"}',
        b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}', b'\xef\xbb\xbf{"model": "m"}', '{"model": "m"}'.encode("utf-16"),
        b'{"model": "a\x00b"}', b"[]", b"5", b"null", b'"text"', b'{"model": "m",}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("parse", PARSERS)
def test_bytes_that_are_no_request_are_refused(parse, body):
    refused(parse, body)


@pytest.mark.parametrize(
    "start", [b"", b'{"a":', b'{"messages":', b'{"tools":[', b'{"metadata":{"a":', b'{"prompt":[']
)
@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
@pytest.mark.parametrize("parse", PARSERS)
def test_deep_nesting_is_refused_at_once(parse, start, bracket):
    started = time.process_time()
    refused(parse, start + bracket * 100_000)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("part", [b"1.0,", b"[1.5],", b'{"a":1.0},'])
def test_a_large_body_is_read_once(part):
    body = b'{"model": "m", "prompt": [' + part * (1 << 20) + b"1]}"
    started = time.process_time()
    refused(parse_completion, body)
    assert time.process_time() - started < 1


def test_an_error_repeats_little_of_the_clients_words():
    error = refused(parse_chat, json.dumps({"x" * 100_000: 1}).encode())
    assert len(error["message"]) < LONGEST + 100
    odd = refused(parse_chat, json.dumps({"a\nb` - at `$.c\x1b[31m": 1}).encode())["message"]
    assert odd.isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__})
)
NEAR = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.just(HELLO) | JSON},
    optional={
        "prompt": JSON | st.lists(st.integers(0, 9) | st.text(max_size=3)),
        "documents": JSON | st.lists(st.fixed_dictionaries({"text": JSON}, optional={"id": JSON})),
    },
)


def taken(parse, body):
    """Whether the body is a request; if not, it was refused. Nothing else may happen."""
    try:
        request = parse(body)
    except Refusal as refusal:
        said = refusal
    else:
        _read_all_of(request)
        return True
    assert said.status == 400
    assert json.loads(said.body())["error"]["message"]
    return False


def _read_all_of(request):
    if isinstance(request, DocumentsRequest):
        assert request.documents
        return
    assert request.sampling.temperature >= 0
    assert request.likely is None or request.likely >= 0
    assert all(request.stops)
    if isinstance(request, ChatRequest):
        assert request.turns
    else:
        assert isinstance(request.alone, str | list)


@given(body=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_request_or_refused(body):
    for parse in PARSERS:
        taken(parse, body)


@given(near=NEAR, changes=st.dictionaries(FIELDS, JSON, max_size=3))
def test_almost_a_request_is_one_or_refused(near, changes):
    body = json.dumps(near | changes).encode()
    for parse in PARSERS:
        taken(parse, body)


@given(cut=st.integers(0, 400))
def test_half_a_request_is_refused(cut):
    whole = json.dumps({"model": "m", "messages": HELLO, "stop": ["ä€😀"] * 4, "seed": 5}).encode()
    assert taken(parse_chat, whole)
    assert cut >= len(whole) or not taken(parse_chat, whole[:cut])
