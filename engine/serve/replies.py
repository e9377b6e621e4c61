"""Events of a request as the bytes that its client gets: one body, or a stream of chunks."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec
from msgspec import UNSET, UnsetType

from engine.request import Completion, Event
from engine.serve.answers import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChunkChoice,
    Delta,
    Said,
    Text,
    TextChoice,
    Usage,
    usage_of,
)
from engine.serve.scores import Placed, Shown, chat_scores, text_scores
from engine.serve.sse import DONE, framed
from engine.serve.token_text import TokenText
from engine.serve.wire import ChatRequest, CompletionRequest

encode = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every part of one answer repeats.

    Args:
        created: seconds since 1970.
        fingerprint: changes when a seed may give other tokens: another model, another version.
    """

    id: str
    created: int
    model: str
    fingerprint: str


def head_of(request: ChatRequest | CompletionRequest, *, created: float, fingerprint: str) -> Head:
    """A new answer's. It names the model as the request did."""
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    return Head(
        id=f"{kind}-{secrets.token_hex(12)}",
        created=int(created),
        model=request.model,
        fingerprint=fingerprint,
    )


def body_of(
    request: ChatRequest | CompletionRequest, head: Head, events: Sequence[Event], words: TokenText
) -> bytes:
    """The whole answer as JSON.

    Args:
        events: all of the request, the last one with the completion.
    """
    done = events[-1].completion
    assert done is not None, "the last event has the completion"
    placed = _placed(events, words) if request.likely is not None else None
    if isinstance(request, ChatRequest):
        return encode(_chat(head, done, placed, words))
    return encode(_text(head, done, placed, words))


@runtime_checkable
class Stream(Protocol):
    """A stream of chunks, framed as server-sent events."""

    def opening(self) -> bytes:
        """What is sent before the first token; may be nothing."""
        ...

    def push(self, event: Event) -> bytes:
        """What an event makes known; often nothing. The last one's ends with `[DONE]`."""
        ...


def stream_of(request: ChatRequest | CompletionRequest, head: Head, words: TokenText) -> Stream:
    """The stream that a request asks for."""
    shown = Shown(words) if request.likely is not None else None
    if isinstance(request, ChatRequest):
        return ChatStream(head, words, shown, request.include_usage)
    return CompletionStream(head, words, shown, request.include_usage)


class ChatStream:
    """The chunks of /v1/chat/completions."""

    def __init__(
        self, head: Head, words: TokenText, shown: Shown | None, include_usage: bool
    ) -> None:
        self._head, self._words, self._shown = head, words, shown
        self._usage = include_usage

    def opening(self) -> bytes:
        """Who speaks."""
        return self._chunk([ChunkChoice(delta=Delta("assistant", ""))])

    def push(self, event: Event) -> bytes:
        """The event's text and scores, and at the end why, the usage, and `[DONE]`."""
        placed = [] if self._shown is None else self._shown.push(event)
        scores = chat_scores(placed, self._words) if placed else None
        out = b""
        if event.text or placed:
            out = self._chunk([ChunkChoice(delta=Delta(content=event.text), logprobs=scores)])
        if event.completion is None:
            return out
        reason = event.completion.finish_reason
        out += self._chunk([ChunkChoice(delta=Delta(), finish_reason=reason)])
        if self._usage:
            out += self._chunk([], usage_of(event.completion.stats))
        return out + DONE

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        head = self._head
        return framed(
            encode(
                ChatChunk(
                    id=head.id,
                    created=head.created,
                    model=head.model,
                    choices=choices,
                    system_fingerprint=head.fingerprint,
                    usage=usage if self._usage else UNSET,
                )
            )
        )


class CompletionStream:
    """The chunks of /v1/completions."""

    def __init__(
        self, head: Head, words: TokenText, shown: Shown | None, include_usage: bool
    ) -> None:
        self._head, self._words, self._shown = head, words, shown
        self._usage = include_usage

    def opening(self) -> bytes:
        """Nothing: a completion has no role."""
        return b""

    def push(self, event: Event) -> bytes:
        """The event's text and scores, and at the end why, the usage, and `[DONE]`."""
        placed = [] if self._shown is None else self._shown.push(event)
        scores = text_scores(placed, self._words) if placed else None
        done = event.completion
        out = b""
        if event.text or placed or done is not None:
            reason = None if done is None else done.finish_reason
            choice = TextChoice(text=event.text, logprobs=scores, finish_reason=reason)
            out = self._chunk([choice])
        if done is None:
            return out
        if self._usage:
            out += self._chunk([], usage_of(done.stats))
        return out + DONE

    def _chunk(self, choices: list[TextChoice], usage: Usage | None = None) -> bytes:
        return framed(encode(_answer(self._head, choices, usage if self._usage else UNSET)))


def _chat(head: Head, done: Completion, placed: Sequence[Placed] | None, words: TokenText) -> Chat:
    choice = ChatChoice(
        message=Said(done.text or ""),
        logprobs=None if placed is None else chat_scores(placed, words),
        finish_reason=done.finish_reason,
    )
    return Chat(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[choice],
        usage=usage_of(done.stats),
        system_fingerprint=head.fingerprint,
    )


def _text(head: Head, done: Completion, placed: Sequence[Placed] | None, words: TokenText) -> Text:
    choice = TextChoice(
        text=done.text or "",
        logprobs=None if placed is None else text_scores(placed, words),
        finish_reason=done.finish_reason,
    )
    return _answer(head, [choice], usage_of(done.stats))


def _answer(head: Head, choices: list[TextChoice], usage: Usage | UnsetType | None) -> Text:
    return Text(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=usage,
        system_fingerprint=head.fingerprint,
    )


def _placed(events: Sequence[Event], words: TokenText) -> list[Placed]:
    shown = Shown(words)
    return [placed for event in events for placed in shown.push(event)]
