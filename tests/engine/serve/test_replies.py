"""Answers as OpenAI's own types read them, whole and in chunks."""

import json

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.serve.replies import Head, body_of, head_of, stream_of
from engine.serve.sse import DONE, MEDIA_TYPE, WAITING, failed
from engine.serve.token_text import TokenText
from engine.serve.wire import parse_chat, parse_completion
from tests.engine.serve.told import ids, of_bytes, of_pieces, told

HEAD = Head(id="chatcmpl-1", created=1700000000, model="m", fingerprint="fp_1")
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 3,
    "total_tokens": 6,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def chat(**fields):
    messages = [{"role": "user", "content": "Hi"}]
    return parse_chat(json.dumps({"model": "m", "messages": messages} | fields).encode())


def text(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi"} | fields).encode())


def body(request, events, tokenizer=None, head=HEAD):
    return json.loads(body_of(request, head, events, TokenText(tokenizer or of_bytes())))


def frames(request, events, tokenizer=None):
    """What is streamed, frame by frame."""
    stream = stream_of(request, HEAD, TokenText(tokenizer or of_bytes()))
    sent = stream.opening() + b"".join(stream.push(event) for event in events)
    assert sent.endswith(DONE)
    assert sent.count(b"\n\n") == sent.count(b"\n") / 2
    return sent.split(b"\n\n")[:-2]


def chunks(request, events, tokenizer=None):
    sent = frames(request, events, tokenizer)
    assert all(frame.startswith(b"data: {") for frame in sent)
    return [json.loads(frame.removeprefix(b"data: ")) for frame in sent]


def known_to_openai(value):
    """Whether OpenAI's types know every field of an answer."""
    if isinstance(value, list):
        return all(map(known_to_openai, value))
    if not hasattr(value, "model_extra"):
        return True
    return not value.model_extra and all(known_to_openai(part) for _, part in value)


def answer(words, **options):
    tokenizer = of_bytes()
    return told(tokenizer, ids(tokenizer, words), **options)


def test_a_chat_is_answered_with_one_choice():
    assert body(chat(), answer("abc")) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "abc", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": USAGE,
        "system_fingerprint": "fp_1",
    }


def test_a_completion_is_answered_with_one_choice():
    assert body(text(), answer("abc", end="stop")) == {
        "id": "chatcmpl-1",
        "object": "text_completion",
        "created": 1700000000,
        "model": "m",
        "choices": [{"text": "abc", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "system_fingerprint": "fp_1",
    }


def test_cached_tokens_are_told():
    events = answer("abc")
    events[-1].completion.stats.cached_tokens = 2
    assert body(chat(), events)["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_a_chat_streams_its_role_its_text_and_its_end():
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000,
            "model": "m", "system_fingerprint": "fp_1"}  # fmt: skip

    def chunk(delta, reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return head | {"choices": [choice]}

    assert chunks(chat(stream=True), answer("ab", end="stop")) == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "a"}),
        chunk({"content": "b"}),
        chunk({}, "stop"),
    ]


def test_a_completion_streams_its_text_and_its_end():
    got = chunks(text(stream=True), answer("ab"))
    choice = {"index": 0, "logprobs": None}
    assert [chunk["choices"] for chunk in got] == [
        [choice | {"text": "a", "finish_reason": None}],
        [choice | {"text": "b", "finish_reason": "length"}],
    ]
    assert all("usage" not in chunk for chunk in got)


@pytest.mark.parametrize("ask", [chat, text])
def test_usage_is_a_chunk_of_its_own_if_asked_for(ask):
    *parts, last = chunks(ask(stream=True, stream_options={"include_usage": True}), answer("abc"))
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"] == USAGE


@pytest.mark.parametrize("ask", [chat, text])
@pytest.mark.parametrize("tokenizer", [of_bytes, of_pieces])
def test_characters_come_whole_and_stop_strings_never(ask, tokenizer):
    tokenizer = tokenizer()
    tokens = ids(tokenizer, "thé €😀 ENDless")
    events = told(tokenizer, tokens, stop=("END",))
    pieces = []
    for chunk in chunks(ask(stream=True), events, tokenizer):
        choice = chunk["choices"][0]
        pieces.append(choice["text"] if ask is text else choice["delta"].get("content", ""))
    assert "".join(pieces) == "thé €😀 "
    assert {"é", "€", "😀"} <= set(pieces) | set("".join(pieces[:3]))
    assert not any("\ufffd" in piece for piece in pieces)
    whole = body(ask(), events, tokenizer)["choices"][0]
    assert whole["finish_reason"] == choice["finish_reason"] == "stop"
    assert (whole["text"] if ask is text else whole["message"]["content"]) == "thé €😀 "


def test_a_stop_string_in_what_the_end_of_an_answer_shows_is_why_it_ends():
    tokenizer = of_bytes()
    done = told(tokenizer, ids(tokenizer, "a€")[:2], stop=["\ufffd"])[-1].completion
    assert (done.text, done.finish_reason) == ("a", "stop")


def test_what_is_not_certain_yet_is_not_sent():
    tokens = ids(of_bytes(), "€EN.")
    stream = stream_of(chat(stream=True), HEAD, TokenText(of_bytes()))
    sent = [stream.push(event) for event in told(of_bytes(), tokens, stop=("END",))]
    assert sent[:2] == [b"", b""]  # of three bytes
    assert b"\xe2\x82\xac" in sent[2]
    assert sent[3:5] == [b"", b""]
    assert b'"EN."' in sent[5]


@pytest.mark.parametrize("probabilities", [False, True])
def test_openais_types_know_every_field(probabilities):
    of_chat = {"logprobs": True, "top_logprobs": 2} if probabilities else {}
    of_text = {"logprobs": 2} if probabilities else {}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    events = answer("th€", top=((0, -0.5), (1, -1.5)))
    made = [
        (ChatCompletion, [body(chat(**of_chat), events)]),
        (Completion, [body(text(**of_text), events)]),
        (ChatCompletionChunk, chunks(chat(**of_chat, **usage), events)),
        (Completion, chunks(text(**of_text, **usage), events)),
    ]
    for shape, objects in made:
        for one in objects:
            if shape is Completion and one["choices"]:
                # a type that is stricter than their server: a chunk has no reason but the last
                one["choices"][0]["finish_reason"] = one["choices"][0]["finish_reason"] or "stop"
            assert known_to_openai(shape.model_validate(one, strict=True)), one


def test_an_answer_has_a_name_of_its_own():
    names = {head_of(chat(), created=5.9, fingerprint="f").id for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("chatcmpl-") for name in names)
    head = head_of(text(), created=5.9, fingerprint="f")
    assert head.id.startswith("cmpl-")
    assert (head.created, head.model, head.fingerprint) == (5, "m", "f")


@pytest.mark.parametrize("ask", [chat, text])
def test_an_answer_may_be_empty(ask):
    events = told(of_bytes(), [of_bytes().eos_token_id], end="stop")
    choice = body(ask(), events)["choices"][0]
    assert (choice["text"] if ask is text else choice["message"]["content"]) == ""
    *_, last = chunks(ask(stream=True), events)
    assert last["choices"][0]["finish_reason"] == "stop"


def test_line_ends_in_a_text_do_not_end_a_frame():
    content = "\n\r\u2028\u2029\u0085 data: x\n\n"
    got = chunks(chat(stream=True), answer(content))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in got) == content


def test_a_stream_that_fails_says_so_in_its_last_event():
    from engine.serve.refusals import crashed

    frame = failed(crashed())
    assert frame.startswith(b'data: {"error":{"message":"The server had an error')
    assert frame.endswith(b"}}\n\n")
    assert WAITING.startswith(b":")
    assert WAITING.endswith(b"\n\n")
    assert MEDIA_TYPE == "text/event-stream"
