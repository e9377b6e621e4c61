"""The official client reads our bytes: no server, its transport is ours."""

import json

import httpx2
import openai
import pytest

from engine.serve.refusals import (
    Refusal,
    crashed,
    invalid,
    no_model,
    overloaded,
    rate_limited,
    timed_out,
    unauthorized,
)
from engine.serve.replies import body_of, head_of, stream_of
from engine.serve.sse import MEDIA_TYPE, WAITING, failed
from engine.serve.token_text import TokenText
from engine.serve.wire import parse_chat, parse_completion
from tests.engine.serve.told import ids, of_bytes, told

SAID = "thé €😀"


class Wire(httpx2.BaseTransport):
    """Answers as the server would, with what the client sent.

    Args:
        refusal: is the answer, or the end of a stream.
    """

    def __init__(self, refusal=None):
        self.refusal, self.asked = refusal, 0

    def handle_request(self, request):
        self.asked += 1
        parse = parse_chat if request.url.path.endswith("chat/completions") else parse_completion
        try:
            asked = parse(request.read())
        except Refusal as refusal:
            return self._refused(refusal)
        if self.refusal is not None and not asked.stream:
            return self._refused(self.refusal)
        head, words = head_of(asked, created=5.0, fingerprint="fp"), TokenText(of_bytes())
        tokens = ids(of_bytes(), SAID)
        top = None if asked.likely is None else ((0, -1.0), (1, -2.0))[: asked.likely]
        events = told(of_bytes(), tokens, top=top, stop=asked.stops, end="stop")
        if not asked.stream:
            return httpx2.Response(200, content=body_of(asked, head, events, words))
        stream = stream_of(asked, head, words)
        parts = [WAITING, stream.opening(), WAITING, *map(stream.push, events)]
        if self.refusal is not None:
            parts = [*parts[:5], failed(self.refusal)]
        headers = {"content-type": MEDIA_TYPE}
        return httpx2.Response(200, content=b"".join(parts), headers=headers)

    def _refused(self, refusal):
        return httpx2.Response(refusal.status, content=refusal.body(), headers=refusal.headers)


@pytest.fixture
def client():
    """Of a wire without faults."""
    with connected(Wire()) as client:
        yield client


def connected(wire, retries=0):
    inner = openai.DefaultHttpxClient(transport=wire)
    return openai.OpenAI(
        api_key="k", base_url="http://headrace/v1", http_client=inner, max_retries=retries
    )


HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_the_client_reads_a_chat(client):
    got = client.chat.completions.create(**HELLO, extra_body={"documents": ["a"], "top_k": 5})
    assert got.choices[0].message.content == SAID
    assert got.choices[0].message.role == "assistant"
    assert got.usage.total_tokens == 3 + len(ids(of_bytes(), SAID))


def test_the_client_streams_a_chat(client):
    options = {"include_usage": True}
    *parts, last = client.chat.completions.create(**HELLO, stream=True, stream_options=options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == SAID
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == len(ids(of_bytes(), SAID))


def test_the_clients_own_accumulation_of_a_stream_is_the_answer(client):
    with client.chat.completions.stream(**HELLO, logprobs=True, top_logprobs=1) as stream:
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == SAID
    data = bytes(byte for token in whole.choices[0].logprobs.content for byte in token.bytes)
    assert data.decode() == SAID


def test_the_client_reads_and_streams_a_completion(client):
    got = client.completions.create(model="m", prompt="Hi", logprobs=1)
    assert got.choices[0].text == SAID
    assert len(got.choices[0].logprobs.tokens) == len(ids(of_bytes(), SAID))
    parts = list(client.completions.create(model="m", prompt=[1, 2], stream=True, stop="€"))
    assert "".join(part.choices[0].text for part in parts) == "thé "
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_wrong_request_is_the_clients_bad_request(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**HELLO, n=3)
    error = caught.value
    assert (error.status_code, error.param, error.code) == (400, "n", "unsupported_value")
    assert error.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: x"):
        client.chat.completions.create(**HELLO, extra_body={"x": 1})


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (invalid("x", "messages", "context_length_exceeded"), openai.BadRequestError),
        (unauthorized("x"), openai.AuthenticationError),
        (no_model("x"), openai.NotFoundError),
        (rate_limited("x", 2.0), openai.RateLimitError),
        (overloaded("x"), openai.InternalServerError),
        (crashed(), openai.InternalServerError),
    ],
)
def test_a_refusal_is_the_clients_own_error(refusal, error):
    with connected(Wire(refusal)) as client, pytest.raises(error) as caught:
        client.chat.completions.create(**HELLO)
    assert caught.value.status_code == refusal.status
    assert caught.value.body == json.loads(refusal.body())["error"]
    assert caught.value.code == refusal.fault.code


def test_a_stream_that_breaks_is_an_error_behind_what_was_said():
    with connected(Wire(crashed())) as client:
        said = []
        with pytest.raises(openai.APIError, match="The server had an error"):
            said.extend(
                part.choices[0].delta.content
                for part in client.chat.completions.create(**HELLO, stream=True)
            )


def test_a_client_does_not_repeat_what_ran_into_its_own_deadline():
    wire = Wire(timed_out("too late"))
    with connected(wire, retries=2) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**HELLO)
    assert caught.value.status_code == 408
    assert wire.asked == 1
