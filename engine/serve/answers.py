"""OpenAI's answers, as objects."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from engine.request import FinishReason, RequestStats
from engine.serve.scores import ChatScores, TextScores


class PromptDetails(msgspec.Struct, frozen=True):
    """Tokens of a prompt whose KV was stored."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Said(msgspec.Struct, frozen=True):
    """The model's turn."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The only one."""

    index: Literal[0] = 0
    message: Said
    logprobs: ChatScores | None
    finish_reason: FinishReason


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The only one."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: ChatScores | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a stream. `usage` is there if it was asked for, and null but in the last one."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The only one."""

    text: str
    index: Literal[0] = 0
    logprobs: TextScores | None = None
    finish_reason: FinishReason | None = None


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/completions, and a part of a stream of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str


def usage_of(stats: RequestStats) -> Usage:
    """What a request took, in OpenAI's words."""
    return Usage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.new_tokens,
        total_tokens=stats.prompt_tokens + stats.new_tokens,
        prompt_tokens_details=PromptDetails(stats.cached_tokens),
    )
