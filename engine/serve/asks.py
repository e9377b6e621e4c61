"""From a client's request to what the service is asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from engine.blend.repair import BlendConfig
from engine.blend.segments import Segments
from engine.serve.refusals import invalid, too_long
from engine.serve.wire import BlendOptions, ChatRequest, CompletionRequest, InlineDocument
from engine.service.ask import Ask
from engine.service.spans import Trace

if TYPE_CHECKING:
    from engine.engine import Engine

USUAL = 16  # tokens of a completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many tokens one request may have.

    Args:
        positions: of the model, which the last token of an answer does not take.
        prompt_tokens, new_tokens: what the server allows; None is what the model can.
        longest: prompt and answer together that memory holds of one request, which an answer that
            nobody gave a length ends at.
        token_bytes: of a text, in one token; None where that is not known.
    """

    positions: int
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    longest: int | None = None
    token_bytes: int | None = None


def ask_of(
    request: ChatRequest | CompletionRequest,
    prompt: Sequence[int] | Segments,
    room: Room,
    *,
    blend: BlendConfig,
    tenant: str = "",
    engine: "Engine | None" = None,
    max_priority: int | None = None,
    trace: Trace | None = None,
) -> Ask:
    """What the service is asked for a request whose prompt is `prompt`.

    Args:
        blend: the server's settings, which a request may change in part.
        max_priority: of the tenant, who gets this instead of more; None for no limit.
    Raises:
        Refusal: prompt and answer are longer than there is room for.
    """
    tokens = prompt.tokens if isinstance(prompt, Segments) else prompt
    options = request.blend if isinstance(request, ChatRequest) else None
    return Ask(
        prompt=prompt,
        max_new_tokens=new_tokens(request, len(tokens), room),
        sampling=request.sampling,
        stop=request.stops,
        blend=_blend(options, blend),
        engine=engine,
        tenant=tenant,
        priority=_at_most(request.priority or 0, max_priority),
        deadline_s=request.timeout_s,
        logprobs=request.likely,
        trace=trace,
    )


def new_tokens(request: ChatRequest | CompletionRequest, prompt_tokens: int, room: Room) -> int:
    """How many tokens the answer may have. Refusal where that is none, or less than asked for.

    Where nothing is asked for: 16 of a completion, as with OpenAI; of a chat, what there is room
    for.
    """
    of_chat = isinstance(request, ChatRequest)
    param, asked = "messages" if of_chat else "prompt", request.new_tokens
    if room.prompt_tokens is not None and prompt_tokens > room.prompt_tokens:
        raise too_long(
            f"This server takes at most {room.prompt_tokens} prompt tokens, your {param} resulted "
            f"in {prompt_tokens} tokens. Please reduce the length of the {param}.",
            param,
        )
    left = room.positions - prompt_tokens + 1  # the last token is not fed back
    if left < 1 or (asked is not None and asked > left):
        raise too_long(_exceeded(prompt_tokens, asked, room.positions, param), param)
    if asked is None:
        held = left if room.longest is None else max(1, room.longest - prompt_tokens)
        return min(left, held, room.new_tokens or left, left if of_chat else USUAL)
    if room.new_tokens is not None and asked > room.new_tokens:
        raise invalid(
            f"max_tokens is too large: {asked}. This server gives at most {room.new_tokens} "
            "completion tokens.",
            _limit(request),
            "invalid_value",
        )
    return asked


def refuse_hopeless(request: ChatRequest | CompletionRequest, room: Room) -> None:
    """Refusal where there are too many tokens, or the text has more bytes than all tokens there may
    be can stand for: it is seen before the text is read, which would take long."""
    if isinstance(request, CompletionRequest) and isinstance(request.alone, list):
        new_tokens(request, len(request.alone), room)
        return
    if room.token_bytes is None:
        return
    most = min(room.positions, room.prompt_tokens or room.positions)
    size = sum(len(text.encode()) for text in _texts(request))
    if size > most * room.token_bytes:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise too_long(
            f"At most {most} prompt tokens are taken, your {param} resulted in {size} bytes, which "
            f"are more than so many tokens. Please reduce the length of the {param}.",
            param,
        )


def _texts(request: ChatRequest | CompletionRequest) -> Iterator[str]:
    """All that is to be tokenised."""
    if isinstance(request, ChatRequest):
        yield from (message.text for message in request.messages)
        documents = request.documents or ()
        yield from (one.text for one in documents if isinstance(one, InlineDocument))
    elif isinstance(request.alone, str):
        yield request.alone


def _limit(request: ChatRequest | CompletionRequest) -> str:
    """The field that the answer's length came from."""
    newer = isinstance(request, ChatRequest) and request.max_completion_tokens is not None
    return "max_completion_tokens" if newer else "max_tokens"


def _exceeded(prompt_tokens: int, asked: int | None, positions: int, param: str) -> str:
    said = f"This model's maximum context length is {positions} tokens."
    if asked is None or prompt_tokens > positions:
        return (
            f"{said} However, your {param} resulted in {prompt_tokens} tokens. Please reduce the "
            f"length of the {param}."
        )
    return (
        f"{said} However, you requested {prompt_tokens + asked} tokens ({prompt_tokens} in the "
        f"{param}, {asked} in the completion). Please reduce the length of the {param} or "
        "completion."
    )


def _blend(options: BlendOptions | None, config: BlendConfig) -> BlendConfig:
    """The server's settings with the request's. What is repaired is not kept, so that deleting a
    document deletes all that was made of it."""
    asked = {} if options is None else {"policy": options.policy, "share": options.share}
    changes = {name: value for name, value in asked.items() if value is not None}
    return msgspec.structs.replace(config, keep_repaired=False, **changes)


def _at_most(asked: int, limit: int | None) -> int:
    return asked if limit is None else min(asked, limit)
