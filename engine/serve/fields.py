"""Fields of requests: their types, and which of OpenAI's have one value here."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

SEEDS = 1 << 63
LONGEST_STOP = 1000  # characters

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=LONGEST_STOP)]
Seed = Annotated[int, Meta(ge=-SEEDS, le=SEEDS - 1)]
One = Annotated[int, Meta(ge=1, le=1)]
Zero = Annotated[float, Meta(ge=0, le=0)]
Neutral = Annotated[float, Meta(ge=1, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[
    int,
    Meta(ge=-1, le=(1 << 31) - 1, description="Only the k most probable tokens; 0 or -1 for all."),
]
Priority = Annotated[
    int, Meta(ge=-100, le=100, description="Higher ones run first, as far as the key allows.")
]
Timeout = Annotated[
    float, Meta(gt=0, le=86400, description="A request that takes longer is given up.")
]
Nothing = Annotated[list[Any], Meta(max_length=0)]

# Fields of OpenAI's that have no effect here, and what may be sent for them nevertheless.
ONLY = {
    "audio": "null",
    "best_of": "1",
    "echo": "false",
    "frequency_penalty": "0",
    "function_call": '"none"',
    "functions": "[]",
    "ignore_eos": "false",
    "logit_bias": "{}",
    "messages.content.type": '"text"',
    "messages.role": '"system", "developer", "user" or "assistant"',
    "messages.tool_calls": "[]",
    "messages.function_call": "null",
    "messages.audio": "null",
    "messages.reasoning": "null",
    "messages.reasoning_content": "null",
    "min_p": "0",
    "min_tokens": "0",
    "modalities": '["text"]',
    "moderation": "null",
    "n": "1",
    "parallel_tool_calls": "null",
    "prediction": "null",
    "presence_penalty": "0",
    "prompt_cache_options": "null",
    "reasoning_effort": '"none"',
    "repetition_penalty": "1",
    "response_format.type": '"text"',
    "service_tier": '"auto" or "default"',
    "stream_options.include_obfuscation": "false",
    "suffix": "null",
    "tool_choice": '"none"',
    "tools": "[]",
    "verbosity": '"medium"',
    "web_search_options": "null",
}


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What comes from a client: a field that nobody knows is refused."""
