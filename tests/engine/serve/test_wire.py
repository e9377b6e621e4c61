"""Requests as OpenAI's clients send them: parsed, or refused with a reason."""

import json
import typing

import pytest
from openai.types import completion_create_params as of_text
from openai.types.chat import completion_create_params as of_chat

from engine.sampling import Sampling
from engine.serve.fields import ONLY
from engine.serve.refusals import Refusal
from engine.serve.wire import ChatRequest, CompletionRequest, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return parse_chat(json.dumps({"model": "m", "messages": HELLO} | fields).encode())


def text(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello"} | fields).encode())


def refused(parse, *args, **fields):
    """The error of what is not taken."""
    with pytest.raises(Refusal) as caught:
        parse(*args, **fields)
    assert caught.value.status == 400
    body = json.loads(caught.value.body())
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == "invalid_request_error"
    return body["error"]


# what is taken


def test_a_chat_is_its_turns():
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "äö😀", "name": "Ann"},
    ]
    assert chat(messages=messages).turns == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "ok"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "äö😀"},
    ]


def test_sampling_is_openais_where_nothing_is_said():
    assert chat().sampling == Sampling(temperature=1.0, top_p=1.0)
    nulls = dict(temperature=None, top_p=None, seed=None, stop=None, n=None, max_tokens=None)
    assert chat(**nulls).sampling == text(**nulls).sampling == Sampling(temperature=1.0)
    given = chat(temperature=0, top_p=0.5, top_k=7, seed=5).sampling
    assert given == Sampling(temperature=0.0, top_k=7, top_p=0.5, seed=5)


def test_no_probability_mass_at_all_is_the_most_probable_token():
    assert chat(temperature=1, top_p=0).sampling == Sampling(temperature=0.0)


def test_any_seed_of_64_bits_is_one():
    for seed in (-(1 << 63), -1, 0, (1 << 63) - 1):
        assert chat(seed=seed).sampling.seed == seed % (1 << 63)


def test_stop_is_one_string_or_several():
    assert chat(stop="END").stops == ("END",)
    assert chat(stop=["a", "b", "c", "d"]).stops == ("a", "b", "c", "d")
    assert chat(stop=[]).stops == chat().stops == ()


def test_the_newer_name_of_the_limit_is_known():
    assert chat(max_completion_tokens=5).new_tokens == chat(max_tokens=5).new_tokens == 5
    assert chat().new_tokens is None


def test_probabilities_are_asked_for_in_two_ways():
    assert chat().likely is chat(logprobs=False).likely is text().likely is None
    assert chat(logprobs=True).likely == 0
    assert chat(logprobs=True, top_logprobs=20).likely == 20
    assert text(logprobs=0).likely == 0
    assert text(logprobs=5).likely == 5


def test_usage_comes_with_a_stream_if_asked_for():
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={"include_usage": None}).include_usage
    assert not chat(stream=True).include_usage


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"]])
def test_a_prompt_is_a_text_or_a_list_of_one(prompt):
    assert text(prompt=prompt).alone == "Hello"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_a_prompt_is_tokens_or_a_list_of_those(prompt):
    assert text(prompt=prompt).alone == [1, 2]


def test_documents_are_ids_and_texts():
    documents = ["a", {"text": "Some text.", "title": "Some"}, {"text": "More."}]
    request = chat(documents=documents, blend={"policy": "union", "share": 1})
    assert request.documents[0] == "a"
    assert [d.text for d in request.documents[1:]] == ["Some text.", "More."]
    assert (request.blend.policy, request.blend.share) == ("union", 1.0)


HARMLESS = {
    "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": 1,
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [],
    "tool_choice": "none", "functions": [], "function_call": "none", "modalities": ["text"],
    "response_format": {"type": "text"}, "reasoning_effort": "none", "verbosity": "medium",
    "audio": None, "prediction": None, "web_search_options": None, "moderation": None,
    "repetition_penalty": 1.0, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False, "top_k": -1,
}  # fmt: skip


@pytest.mark.parametrize("field", HARMLESS)
def test_what_changes_nothing_is_accepted(field):
    chat(**{field: HARMLESS[field]})
    chat(**{field: None})


@pytest.mark.parametrize(
    ("request_type", "params"), [(ChatRequest, of_chat), (CompletionRequest, of_text)]
)
def test_every_field_of_openais_is_known(request_type, params):
    names = set()
    for streaming in ("Streaming", "NonStreaming"):
        kind = "CompletionCreateParams" + streaming
        names |= set(typing.get_type_hints(getattr(params, kind), include_extras=False))
    ours = set(request_type.__struct_fields__)
    assert names <= ours
    extras = {"top_k", "priority", "timeout_s", "documents", "blend"}
    extras |= {"repetition_penalty", "min_p", "min_tokens", "ignore_eos"}  # vLLM's
    assert ours - names <= extras


def test_a_whole_number_may_have_a_point():
    request = chat(max_tokens=5.0, seed=-1.0, temperature=0.5, metadata={"a": "5.0"})
    assert (request.new_tokens, request.seed, request.temperature) == (5, -1, 0.5)
    assert text(prompt=[1.0, 2]).alone == [1, 2]


# what is not


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("n", 0), ("frequency_penalty", 0.5), ("presence_penalty", -1),
        ("logit_bias", {"5": 1}), ("tools", [{"type": "function"}]), ("tool_choice", "auto"),
        ("tool_choice", {"type": "function"}), ("functions", [{"name": "f"}]), ("tools", {}),
        ("modalities", ["audio"]), ("audio", {"voice": "x"}), ("reasoning_effort", "low"),
        ("verbosity", "high"), ("prediction", {"type": "content"}), ("web_search_options", {}),
        ("parallel_tool_calls", True), ("service_tier", "flex"), ("moderation", {"model": "m"}),
        ("repetition_penalty", 1.1), ("min_p", 0.1), ("min_tokens", 5), ("ignore_eos", True),
    ],
)  # fmt: skip
def test_what_is_not_supported_says_so(field, value):
    error = refused(chat, **{field: value})
    name = error["param"].partition("[")[0]
    assert (name, error["code"]) == (field, "unsupported_value")
    accepted = ONLY[field]
    assert error["message"].endswith(f"only {accepted} is supported here.")


def test_other_formats_of_answers_are_not_supported():
    error = refused(chat, response_format={"type": "json_object"})
    assert (error["param"], error["code"]) == ("response_format.type", "unsupported_value")


def test_an_unknown_argument_is_answered_as_openai_does():
    error = refused(chat, foo=1)
    assert error["message"] == "Unrecognized request argument supplied: foo"
    assert (error["param"], error["code"]) == (None, None)
    assert "documents" in refused(text, documents=["a"])["message"]  # belongs to chats


def test_an_unknown_argument_within_names_its_place():
    error = refused(chat, messages=[{"role": "user", "content": "x", "colour": 1}])
    assert error["message"] == "Unknown parameter: 'messages[0].colour'."
    assert (error["param"], error["code"]) == ("messages[0].colour", "unknown_parameter")


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ([], "messages", "invalid_value"),
        ("Hello", "messages", "invalid_type"),
        ([5], "messages[0]", "invalid_type"),
        ([{"role": "user"}], "messages[0].content", "missing_required_parameter"),
        ([{"content": "x"}], "messages[0].role", "missing_required_parameter"),
        ([*HELLO, {"role": "user", "content": None}], "messages[1].content", "invalid_type"),
        ([{"role": "user", "content": []}], "messages[0].content", "invalid_value"),
        ([{"role": "tool", "content": "x"}], "messages[0].role", "unsupported_value"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "messages[0].tool_calls",
            "unsupported_value",
        ),
    ],
)
def test_a_wrong_message_is_named(messages, param, code):
    error = refused(chat, messages=messages)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("temperature", 2.1, "invalid_value"), ("temperature", "1", "invalid_type"),
        ("top_p", -0.1, "invalid_value"), ("max_tokens", 0, "invalid_value"),
        ("max_tokens", 1.5, "invalid_type"), ("max_tokens", True, "invalid_type"),
        ("max_tokens", 1 << 40, "invalid_value"), ("seed", 1 << 63, "invalid_value"),
        ("seed", 10**400, "invalid_value"), ("stop", ["a"] * 5, "invalid_value"),
        ("stop", "", "invalid_value"), ("stop", 5, "invalid_type"),
        ("stream", "yes", "invalid_type"), ("top_logprobs", 21, "invalid_value"),
        ("top_k", -2, "invalid_value"), ("priority", 101, "invalid_value"),
        ("timeout_s", 0, "invalid_value"), ("model", "", "invalid_value"),
        ("model", None, "invalid_type"), ("metadata", {"a": 1}, "invalid_type"),
        ("user", 5, "invalid_type"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field, value, code):
    error = refused(chat, **{field: value})
    assert (error["param"], error["code"]) == (field, code)
    assert error["message"].startswith(f"Invalid value for '{field}': expected ")


def test_types_are_called_as_in_json():
    said = refused(chat, max_tokens="5")["message"]
    assert said == "Invalid value for 'max_tokens': expected integer or null, got string."


def test_fields_that_contradict_each_other_are_refused():
    assert refused(chat, max_tokens=1, max_completion_tokens=2)["param"] == "max_tokens"
    assert refused(chat, top_logprobs=2)["param"] == "top_logprobs"
    assert refused(chat, stream_options={"include_usage": True})["param"] == "stream_options"
    assert refused(chat, blend={"share": 0.5})["param"] == "blend"
    options = {"include_obfuscation": True}
    assert refused(chat, stream=True, stream_options=options)["code"] == "unsupported_value"


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [[1], 2], ["a", "b"], [[1], [2]], None, {}, [-1], [1.5], [True]]
)
def test_a_prompt_that_is_none_or_several_is_refused(prompt):
    assert refused(text, prompt=prompt)["param"].startswith("prompt")


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"n": 2}])
def test_what_completions_do_not_support_says_so(fields):
    error = refused(text, **fields)
    assert [error["param"]] == list(fields)
    assert error["code"] == "unsupported_value"


def test_a_missing_field_is_named():
    error = refused(parse_completion, b'{"model": "m"}')
    assert error["message"] == "Missing required parameter: 'prompt'."
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")
