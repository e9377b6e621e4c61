"""One request from prompt to last token."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, NamedTuple

from engine.blend.repair import BlendConfig, BlendReport
from engine.blend.segments import Segments
from engine.cache import Cache, SparseStats
from engine.errors import PromptError, PromptTooLong
from engine.sampling import Sampling, TokenLogprob, logprobs, sample
from engine.text import TextStream
from kvstore.block import BlockKey, Precision
from kvstore.sources import Shared

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int] | Segments


@dataclass(slots=True)
class RequestStats:
    """What a request cost. Times are in seconds from its submission."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the store
    ttft_s: float = 0.0  # until the first token
    total_s: float = 0.0
    new_tokens: int = 0
    sparse: SparseStats | None = None  # of a sparse method
    blend: BlendReport | None = None  # of a prompt of segments

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, by the time they took; 0 where there was one only."""
        spent = self.total_s - self.ttft_s
        return (self.new_tokens - 1) / spent if self.new_tokens > 1 and spent > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    Args:
        tokens: generated ids, the end-of-text token included where there was one.
        text: without special tokens, ending before a stop string; None without a tokenizer.
        finish_reason: "stop" (end of text, or a stop string) or "length" (`max_new_tokens`, or
            the model's last position).
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    stats: RequestStats


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a stream: a token, the text it made certain, and on the last one the end."""

    token: int
    text: str
    completion: Completion | None = None
    logprob: TokenLogprob | None = None


class Chosen(NamedTuple):
    """A token, and why it is the last one, as far as tokens tell: a stop string may end before."""

    token: int
    ending: FinishReason | None
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: token ids, how to choose the next, and when to end.

    Args:
        logprobs: how many of the most probable tokens come with each chosen one and its own
            probability; None for none of it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def check(self, vocab: int, max_positions: int) -> None:
        """PromptError unless a model of this vocabulary and length can take it."""
        if not self.prompt:
            raise PromptError("the prompt is empty: at least one token is needed")
        if self.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens must be from 1 up, got {self.max_new_tokens}")
        if any(not 0 <= token < vocab for token in self.prompt):
            bad = next(token for token in self.prompt if not 0 <= token < vocab)
            raise PromptError(f"token id {bad} is out of range: the model knows 0 to {vocab - 1}")
        if len(self.prompt) > max_positions:
            raise PromptTooLong(
                f"the prompt has {len(self.prompt)} tokens, the model {max_positions} positions: "
                "shorten the prompt or use a model with a longer context"
            )
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise PromptError(f"a stop string is text of a character or more, got {stop!r}")


def whole(name: str, value: int) -> int:
    """A whole number of whatever type, NumPy's too. PromptError for anything else."""
    try:
        return index(value)
    except TypeError as error:
        raise PromptError(f"{name} must be a whole number, got {value!r}") from error


class Running:
    """State of a request between two steps.

    Args:
        movable: its KV may be moved to a lower tier and back.
        precision: what KV from the store may have lost; what it leaves there is no better.
    """

    def __init__(
        self,
        request: Request,
        *,
        eos: frozenset[int],
        limit: int,
        tokenizer: Any,
        segments: Segments | None = None,
        blend: BlendConfig | None = None,
        movable: bool = False,
        precision: Precision = Precision.EXACT,
    ) -> None:
        self.request, self.movable, self.precision = request, movable, precision
        self.segments, self.blend = segments, blend or BlendConfig()
        self.tokens: list[int] = []
        self.cache: Cache | None = None  # while it runs
        self.keys: Sequence[BlockKey] = ()  # of the full blocks of its tokens, as far as needed yet
        self.repair: bytes | None = None  # what names its blocks, where they are not exact
        self.stored: Sequence[BlockKey] = ()  # blocks its prompt took from the store
        self.shared: Shared = None  # what a shared tier said to have
        self.stats = RequestStats(prompt_tokens=len(request.prompt))
        self.finish_reason: FinishReason | None = None
        self.load_s = self.waited_s = 0.0  # while what is stored of its prompt came, and for that
        self._eos, self._limit = eos, limit
        self._text = None if tokenizer is None else TextStream(tokenizer, request.stop)
        self._told: list[int] = []  # of the tokens, those whose text was given out
        self._pieces: list[str] = []
        self._generator = request.sampling.generator()
        self._started = time.perf_counter()

    @property
    def capacity(self) -> int:
        """Tokens whose KV the request may need: the last one's is never asked for."""
        return len(self.request.prompt) + self._limit - 1

    @property
    def all_tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt, *self.tokens]

    def step(self, logits: Any) -> Event:
        """Choose a token from `logits` [vocab] and take note of it."""
        return self.tell(self.choose(logits))

    def choose(self, logits: Any) -> Chosen:
        """The next token. Its text is another matter, which may be another thread's: `tell`."""
        token = sample(logits, self.request.sampling, self._generator)
        self.tokens.append(token)
        if len(self.tokens) == 1:
            self.stats.ttft_s = time.perf_counter() - self._started
        top = self.request.logprobs
        logprob = None if top is None else logprobs(logits, token, top)
        return Chosen(token, self._ending(token), logprob)

    def tell(self, chosen: Chosen) -> Event:
        """What a chosen token makes certain, in the order of choice; sets `finish_reason`."""
        self._told.append(chosen.token)
        text, self.finish_reason = "", chosen.ending
        if self._text is not None:
            text = self._text.push(chosen.token)
            if self.finish_reason is not None:
                text += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        self._pieces.append(text)
        self.stats.new_tokens = len(self._told)
        self.stats.total_s = time.perf_counter() - self._started
        done = self.completion() if self.finish_reason else None
        return Event(chosen.token, text, done, chosen.logprob)

    def release(self) -> None:
        """Free the cache; what it did stays in `stats`."""
        if self.cache is not None:
            self.stats.sparse = self.cache.stats
            self.cache.close()
            self.cache = None

    def completion(self) -> Completion:
        """The answer as it stands; complete once `finish_reason` is set."""
        text = None if self._text is None else "".join(self._pieces)
        return Completion(self._told, text, self.finish_reason or "length", self.stats)

    def _ending(self, token: int) -> FinishReason | None:
        if token in self._eos:
            return "stop"
        return "length" if len(self.tokens) >= self._limit else None


def listed(prompts: Any) -> list[Prompt]:
    """A batch: of one, for a text, one list of token ids, or segments."""
    if isinstance(prompts, str | Segments):
        return [prompts]
    given = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    given = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in given]
    alone = [hasattr(prompt, "__index__") for prompt in given]
    if any(alone) and not all(alone):
        raise PromptError("prompts mixes token ids with prompts: wrap each token list in a list")
    return [given] if any(alone) else given
