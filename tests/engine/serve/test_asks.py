"""From a request to what the service is asked."""

import json

import pytest

from engine.blend.repair import BlendConfig
from engine.blend.segments import Segments
from engine.sampling import Sampling
from engine.serve.asks import Room, ask_of, new_tokens, refuse_hopeless
from engine.serve.refusals import Refusal
from engine.serve.wire import parse_chat, parse_completion

ROOM = Room(positions=100)


def chat(**fields):
    messages = [{"role": "user", "content": "Hi"}]
    return parse_chat(json.dumps({"model": "m", "messages": messages} | fields).encode())


def text(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi"} | fields).encode())


def refused(*args):
    with pytest.raises(Refusal) as caught:
        new_tokens(*args)
    assert caught.value.status == 400
    return caught.value.fault


def test_all_that_is_asked_for_arrives():
    request = chat(
        max_tokens=7, temperature=0.5, seed=3, stop=["a", "b"], priority=4, timeout_s=2.5,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    ask = ask_of(request, [1, 2], ROOM, blend=BlendConfig(), tenant="ann")
    assert (ask.prompt, ask.max_new_tokens, ask.stop) == ([1, 2], 7, ("a", "b"))
    assert ask.sampling == Sampling(temperature=0.5, seed=3)
    assert (ask.priority, ask.deadline_s, ask.logprobs, ask.tenant) == (4, 2.5, 3, "ann")


def test_a_request_changes_parts_of_the_blend():
    ours = BlendConfig(policy="boundary", share=0.5, keep_repaired=True)
    asked = {"documents": ["a"], "blend": {"share": 0.25}}
    got = ask_of(chat(**asked), [1], ROOM, blend=ours).blend
    assert got == BlendConfig(policy="boundary", share=0.25, keep_repaired=False)
    assert ask_of(text(), [1], ROOM, blend=BlendConfig()).blend == BlendConfig()


def test_a_priority_is_no_more_than_the_tenants():
    for asked, most, got in [(5, 2, 2), (-5, 2, -5), (5, None, 5), (None, 0, 0)]:
        ask = ask_of(chat(priority=asked), [1], ROOM, blend=BlendConfig(), max_priority=most)
        assert ask.priority == got


def test_parts_of_a_prompt_are_counted_together():
    prompt = Segments([1], [[2, 3], [4]], [5], [6])
    with pytest.raises(Refusal, match="resulted in 7 tokens"):
        ask_of(chat(), prompt, Room(positions=6), blend=BlendConfig())
    assert ask_of(chat(), prompt, Room(positions=7), blend=BlendConfig()).max_new_tokens == 1


def test_a_chat_may_use_all_that_is_left_and_a_completion_16():
    assert new_tokens(chat(), 90, ROOM) == 11  # the last one takes no position
    assert new_tokens(text(), 50, ROOM) == 16
    assert new_tokens(text(), 95, ROOM) == 6
    assert new_tokens(chat(), 50, Room(positions=100, new_tokens=20)) == 20
    assert new_tokens(text(), 50, Room(positions=100, new_tokens=10)) == 10


def test_a_prompt_at_the_models_length_has_one_token():
    assert new_tokens(chat(), 100, ROOM) == 1
    fault = refused(chat(), 101, ROOM)
    assert (fault.code, fault.param) == ("context_length_exceeded", "messages")
    assert fault.message.startswith("This model's maximum context length is 100 tokens. However, ")


def test_prompt_and_answer_must_fit():
    assert new_tokens(text(max_tokens=51), 50, ROOM) == 51
    fault = refused(text(max_tokens=52), 50, ROOM)
    assert (fault.code, fault.param) == ("context_length_exceeded", "prompt")
    assert "you requested 102 tokens (50 in the prompt, 52 in the completion)" in fault.message


def test_the_servers_own_limits_hold():
    room = Room(positions=100, prompt_tokens=10, new_tokens=5)
    assert new_tokens(chat(max_tokens=5), 10, room) == 5
    assert refused(chat(), 11, room).code == "context_length_exceeded"
    fault = refused(chat(max_tokens=6), 10, room)
    assert (fault.param, fault.code) == ("max_tokens", "invalid_value")
    assert refused(chat(max_completion_tokens=6), 10, room).param == "max_completion_tokens"


def test_a_length_that_nobody_asked_for_is_what_memory_holds():
    room = Room(positions=100, longest=60)
    assert new_tokens(chat(), 50, room) == 10
    assert new_tokens(text(), 50, room) == 10
    assert new_tokens(text(), 30, room) == 16
    assert new_tokens(chat(max_tokens=40), 50, room) == 40  # the service says why it cannot be
    assert new_tokens(chat(), 70, room) == 1  # likewise


def test_too_many_tokens_are_hopeless_before_anything_is_made_of_them():
    room = Room(positions=10)
    refuse_hopeless(text(prompt=[5] * 10), room)
    for long in ([5] * 11, [[5] * 11]):
        with pytest.raises(Refusal, match="resulted in 11 tokens"):
            refuse_hopeless(text(prompt=long), room)


def test_a_text_of_too_many_bytes_is_hopeless():
    room = Room(positions=10, prompt_tokens=4, token_bytes=2)
    refuse_hopeless(text(prompt="x" * 8), room)
    refuse_hopeless(text(prompt="x" * 99), Room(positions=10))
    for long in (
        text(prompt="é" * 5),
        chat(messages=[{"role": "user", "content": "x" * 5}] * 2),
        chat(documents=["a", {"text": "x" * 9}]),
    ):
        with pytest.raises(Refusal, match="At most 4 prompt tokens") as refused:
            refuse_hopeless(long, room)
        assert refused.value.fault.code == "context_length_exceeded"
