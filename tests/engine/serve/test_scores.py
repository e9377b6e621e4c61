"""Logprobs: the tokens of what is shown, no more and no fewer, in two formats."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling import Likely, TokenLogprob
from engine.serve.replies import Head, body_of, stream_of
from engine.serve.scores import FLOOR, Placed, Shown, chat_scores, text_scores
from engine.serve.token_text import TokenText
from engine.serve.wire import parse_chat, parse_completion
from tests.engine.serve.told import ids, of_bytes, of_pieces, told

HEAD = Head(id="1", created=1, model="m", fingerprint="f")
WORDS = st.text(st.sampled_from("the lo.€😀ä"), max_size=16)
STOPS = st.lists(st.text(st.sampled_from("the lo.€"), min_size=1, max_size=4), max_size=2)


def shown(tokenizer, events):
    """The tokens that come with each event."""
    found = Shown(TokenText(tokenizer))
    return [found.push(event) for event in events]


def data(groups):
    return [placed.data for group in groups for placed in group]


@pytest.mark.parametrize("tokenizer", [of_bytes, of_pieces])
@given(words=WORDS, stop=STOPS)
def test_the_tokens_are_those_of_the_shown_text(tokenizer, words, stop):
    tokenizer = tokenizer()
    events = told(tokenizer, ids(tokenizer, words), stop=stop, top=())
    content = "".join(event.text for event in events)
    whole = b"".join(data(shown(tokenizer, events))).decode(errors="ignore")
    assert whole.startswith(content)
    if not events or events[-1].completion.finish_reason == "length":
        assert whole == content


@pytest.mark.parametrize("tokenizer", [of_bytes, of_pieces])
@given(words=WORDS, stop=STOPS)
def test_tokens_come_with_their_text(tokenizer, words, stop):
    tokenizer = tokenizer()
    events = told(tokenizer, ids(tokenizer, words), stop=stop, top=())
    text, so_far = "", b""
    for event, group in zip(events, shown(tokenizer, events)):
        text += event.text
        so_far += b"".join(data([group]))
        assert so_far.startswith(text.encode())  # not too late
        assert all(placed.offset < len(text) or not placed.data for placed in group)  # nor early


@given(words=WORDS)
def test_offsets_are_where_a_token_begins_in_the_text(words):
    tokenizer = of_bytes()
    tokens = ids(tokenizer, words)
    groups = shown(tokenizer, told(tokenizer, tokens, top=()))
    before = b""
    for placed in (placed for group in groups for placed in group):
        partial = before.decode(errors="ignore")  # a character that it continues is its place
        assert placed.offset == len(partial)
        before += placed.data
    assert before.decode() == words


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        (b"\x9ca", [0, 1]),
        ("ä".encode() + b"\x9ca", [0, 0, 1, 2]),
        (b"\xe2\x82a", [0, 0, 1]),
        (b"\xed\xa2a", [0, 1, 2]),  # half of a pair: what follows it cannot begin so
        (b"\xffa", [0, 1]),
    ],
)
def test_bytes_that_are_no_character_have_a_place_in_the_text(text, offsets):
    tokenizer, words = of_bytes(), TokenText(of_bytes())
    of = {words.data(token): token for token in range(len(tokenizer))}
    tokens = [of[bytes([byte])] for byte in text]
    events = told(tokenizer, tokens, top=())
    found = [placed for group in shown(tokenizer, events) for placed in group]
    assert [placed.offset for placed in found] == offsets
    assert "".join(event.text for event in events)[offsets[-1] :] == "a"


def test_the_token_of_a_stop_string_is_not_told():
    tokenizer = of_bytes()
    events = told(tokenizer, ids(tokenizer, "aab."), stop=["ab"], top=())
    assert data(shown(tokenizer, events)) == [b"a"]


def test_the_token_that_ends_a_text_is_not_told():
    tokenizer = of_bytes()
    tokens = [*ids(tokenizer, "a"), tokenizer.eos_token_id]
    assert data(shown(tokenizer, told(tokenizer, tokens, end="stop", top=()))) == [b"a"]


def test_parts_of_a_character_that_is_never_finished_are_told():
    tokenizer = of_bytes()
    tokens = ids(tokenizer, "a😀")[:-1]
    assert data(shown(tokenizer, told(tokenizer, tokens, top=()))) == [
        b"a",
        b"\xf0",
        b"\x9f",
        b"\x98",
    ]


def test_nothing_is_told_that_was_not_asked_for():
    tokenizer = of_bytes()
    assert data(shown(tokenizer, told(tokenizer, ids(tokenizer, "abc")))) == []


# the two formats


def answered(parse, events, **fields):
    ask = {"model": "m", "prompt": "x", **fields}
    if parse is parse_chat:
        ask = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    request = parse(json.dumps(ask).encode())
    words = TokenText(of_bytes())
    whole = json.loads(body_of(request, HEAD, events, words))["choices"][0]
    stream = stream_of(request, HEAD, words)
    sent = b"".join(map(stream.push, events))
    lines = [line.removeprefix(b"data: ") for line in sent.split(b"\n\n")[:-2]]
    parts = [json.loads(line)["choices"][0] for line in lines]
    return whole["logprobs"], [part["logprobs"] for part in parts if part["logprobs"]]


def test_a_chats_logprobs_are_exact_in_bytes():
    a, *euro = ids(of_bytes(), "a€")
    events = told(of_bytes(), [a, *euro], top=((a, -0.5), (euro[0], -1.5)))
    whole, parts = answered(parse_chat, events, logprobs=True, top_logprobs=2)
    top = [
        {"token": "a", "logprob": -0.5, "bytes": [97]},
        {"token": "\ufffd", "logprob": -1.5, "bytes": [0xE2]},
    ]
    assert whole == {
        "content": [
            {"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": top},
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xE2], "top_logprobs": top},
            {"token": "\ufffd", "logprob": -0.75, "bytes": [0x82], "top_logprobs": top},
            {"token": "\ufffd", "logprob": -1.0, "bytes": [0xAC], "top_logprobs": top},
        ],
        "refusal": None,
    }
    assert [len(part["content"]) for part in parts] == [1, 3]
    assert [token for part in parts for token in part["content"]] == whole["content"]


def test_a_completions_logprobs_are_four_lists():
    a, *euro = ids(of_bytes(), "a€")
    events = told(of_bytes(), [a, *euro], top=((a, -0.5), (euro[0], -1.5)))
    whole, parts = answered(parse_completion, events, logprobs=2)
    top = {"a": -0.5, "bytes:\\xe2": -1.5}
    assert whole == {
        "tokens": ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"],
        "token_logprobs": [-0.25, -0.5, -0.75, -1.0],
        "top_logprobs": [
            top | {"a": -0.25},  # the chosen one's own
            top | {"bytes:\\xe2": -0.5},
            top | {"bytes:\\x82": -0.75},
            top | {"bytes:\\xac": -1.0},
        ],
        "text_offset": [0, 1, 1, 1],
    }
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_without_alternatives_there_are_none():
    events = told(of_bytes(), ids(of_bytes(), "ab"), top=())
    whole, _ = answered(parse_completion, events, logprobs=0)
    assert whole["top_logprobs"] is None
    whole, _ = answered(parse_chat, events, logprobs=True)
    assert [token["top_logprobs"] for token in whole["content"]] == [[], []]


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e9])
def test_what_json_cannot_say_is_the_floor(logprob):
    words = TokenText(of_bytes())
    placed = [Placed(TokenLogprob(5, logprob, (Likely(6, logprob),)), b"x", 0)]
    (token,) = chat_scores(placed, words).content
    assert token.logprob == token.top_logprobs[0].logprob == FLOOR
    scores = text_scores(placed, words)
    assert scores.token_logprobs == [FLOOR]
    assert set(scores.top_logprobs[0].values()) == {FLOOR}
