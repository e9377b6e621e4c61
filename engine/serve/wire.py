"""OpenAI's requests: what may be asked of a model, and nothing else."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from engine.blend.repair import PolicyName
from engine.sampling import Sampling
from engine.serve.fields import (
    ONLY,
    SEEDS,
    Count,
    Name,
    Neutral,
    Nothing,
    One,
    Priority,
    Seed,
    Share,
    StopString,
    Timeout,
    TokenId,
    TopK,
    Wire,
    Zero,
)
from engine.serve.reading import read
from engine.serve.refusals import Refusal, invalid, unsupported


class StreamOptions(Wire, frozen=True, kw_only=True):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, Meta(extra_json_schema={"const": False})] | None = None


class TextPart(Wire, frozen=True, kw_only=True):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Wire, frozen=True, kw_only=True):
    """A turn of a conversation. `name` is accepted and not shown to the model. An assistant's turn
    may say nothing: null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)] | None
    name: str | None = None
    refusal: None = None
    annotations: Nothing | None = None
    reasoning: None = None
    reasoning_content: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    @property
    def text(self) -> str:
        """All of it; parts stand on lines of their own."""
        if isinstance(self.content, str | None):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class InlineDocument(Wire, frozen=True, kw_only=True):
    """A text that comes with the question."""

    text: Annotated[str, Meta(min_length=1)]
    title: str | None = None


Documents = Annotated[
    list[Name | InlineDocument],
    Meta(
        max_length=10_000,
        description="What the conversation is about, in this order: ids of documents or of their "
        "chunks, or texts. The KV of what was added before is reused.",
    ),
]


class BlendOptions(Wire, frozen=True, kw_only=True):
    """How reused chunks are repaired; what is left out is the server's setting."""

    policy: PolicyName | None = None
    share: Share | None = None


class TextFormat(Wire, frozen=True, kw_only=True):
    """The only format of an answer."""

    type: Literal["text"]


class Options(Wire, frozen=True, kw_only=True):
    """What chats and completions have in common. `top_k` and what follows are not OpenAI's; of
    some of vLLM's, clients send what has no effect."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=0)] | None = None
    user: str | None = None
    top_k: TopK | None = None
    repetition_penalty: Neutral | None = None
    min_p: Zero | None = None
    min_tokens: Zero | None = None
    ignore_eos: Annotated[bool, Meta(extra_json_schema={"const": False})] | None = None
    priority: Priority | None = None
    timeout_s: Timeout | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen: OpenAI's temperature is 1 where nothing is said."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        if top_p == 0:  # the most probable token alone
            temperature, top_p = 0.0, 1.0
        seed = None if self.seed is None else self.seed % SEEDS
        return Sampling(temperature, max(self.top_k or 0, 0), top_p, seed)


class ChatRequest(Options, frozen=True, kw_only=True):
    """A conversation that the model continues."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: None = None
    functions: Nothing | None = None
    function_call: Literal["none"] | None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    web_search_options: None = None
    documents: Documents | None = None
    blend: BlendOptions | None = None

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as chat templates take it, which call a developer "system"."""
        system = {"developer": "system"}
        return [{"role": system.get(m.role, m.role), "content": m.text} for m in self.messages]

    @property
    def new_tokens(self) -> int | None:
        """How many at most; None for the usual."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likely(self) -> int | None:
        """How many of the most probable tokens come with each; None for no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Options, frozen=True, kw_only=True):
    """A text that the model continues."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: One | None = None
    echo: Annotated[bool, Meta(extra_json_schema={"const": False})] | None = None
    suffix: None = None

    @property
    def alone(self) -> str | list[int]:
        """The one prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0]
        return first if isinstance(first, str | list) else self.prompt  # type: ignore[return-value]

    @property
    def new_tokens(self) -> int | None:
        """How many at most; None for the usual."""
        return self.max_tokens

    @property
    def likely(self) -> int | None:
        """How many of the most probable tokens come with each; None for no probabilities."""
        return self.logprobs


def parse_chat(body: bytes) -> ChatRequest:
    """The request of /v1/chat/completions. Refusal for any other."""
    request = read(body, ChatRequest, ONLY)
    _refuse_options(request)
    _refuse_silence(request.messages)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid(
            "'max_tokens' and 'max_completion_tokens' are two names for one limit: send one.",
            "max_tokens",
            "invalid_parameter_combination",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid(
            "The 'logprobs' parameter must be set to true when 'top_logprobs' is used.",
            "top_logprobs",
        )
    if request.blend is not None and not request.documents:
        raise invalid("'blend' says how documents are reused: send 'documents' too.", "blend")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """The request of /v1/completions. Refusal for any other."""
    request = read(body, CompletionRequest, ONLY)
    _refuse_options(request)
    if request.echo:
        raise _unsupported("echo")
    _refuse_prompts(request.prompt)
    return request


def _refuse_options(request: Options) -> None:
    if request.ignore_eos:
        raise _unsupported("ignore_eos")
    if request.stream_options is None:
        return
    if not request.stream:
        raise invalid(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            "stream_options",
        )
    if request.stream_options.include_obfuscation:
        raise _unsupported("stream_options.include_obfuscation")


def _refuse_silence(messages: Sequence[Message]) -> None:
    """Only an assistant may have said nothing."""
    for number, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            field = f"messages[{number}].content"
            expected = f"Invalid value for '{field}': expected string or array, got null."
            raise invalid(expected, field, "invalid_type")


def _refuse_prompts(prompt: str | list[str | int | list[int]]) -> None:
    """Several prompts, or a mixture."""
    if isinstance(prompt, str):
        return
    if all(isinstance(token, int) for token in prompt):
        return
    if any(isinstance(token, int) for token in prompt):
        message = "Invalid value for 'prompt': it mixes token ids with prompts."
        raise invalid(message, "prompt", "invalid_type")
    if len(prompt) > 1:
        message = f"One prompt a request is supported here, got {len(prompt)}: send them singly."
        raise invalid(message, "prompt", "unsupported_value")
    if prompt[0] == []:
        raise invalid("Invalid value for 'prompt': it has no token.", "prompt", "invalid_value")


def _unsupported(field: str) -> Refusal:
    return unsupported(field, ONLY[field])
