"""What fidelity and speed start from: a turn whose context was read, and caches that go on."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.cache import Cache
from engine.engine import Engine
from engine.errors import ConfigError, EngineError, PromptError
from engine.model.pieces import Model
from engine.sparse.cache import pool_shape, sparse_layers
from evals.context import Context
from evals.prompt import Asked, ask
from evals.record import Record
from evals.task import Sample
from evals.ways import Way
from kvstore.errors import StoreError
from kvstore.pool.pinned import PinnedTier

QUESTION_TOKENS = 64  # that go through the decode path; of a longer question, these are its last
FAILURES = (EngineError, StoreError, ValueError, ImportError, MemoryError, RuntimeError)


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A turn of a sample: `context` was read densely, `question` is to go through decode.

    Args:
        room: tokens that a cache has place for behind the context, the question's included.
    """

    engine: Engine
    sample: Sample
    turn: int
    asked: Asked
    context: Context
    question: tuple[int, ...]
    room: int

    @property
    def model(self) -> Model:
        return self.engine.model

    @contextmanager
    def cache(self, way: Way) -> Iterator[Cache]:
        """A cache of the method as if it had read the context; closed at the end."""
        if not way.method.sparse:
            yield self.context.dense(self.room)
            return
        if not sparse_layers(self.model, way.method):
            raise ConfigError(f"{way.name} selects in no layer: {_why_dense(self.model, way)}")
        shape = pool_shape(self.model, way.method)
        blocks = -(-(self.context.length + self.room) // shape.block_tokens)
        room = min(blocks * shape.block_bytes, self.engine.config.pinned_bytes)
        with (
            closing(PinnedTier(shape, room)) as pool,
            closing(self.context.sparse(way.method, pool)) as cache,
        ):
            yield cache

    def record(self, suite: str, way: Way, **found: Any) -> Record:
        """What was found in this turn by a method."""
        prompt: dict[str, Any] = {
            "prompt_sha256": self.asked.sha256,
            "prompt_tokens": self.asked.tokens,
            "prefill_s": self.context.prefill_s,
        }
        return Record.of(
            self.sample, self.turn, way.name, way.budget, suite=suite, **(prompt | found)
        )


def _why_dense(model: Model, way: Way) -> str:
    """Why a method selects in no layer."""
    first = way.method.dense_layers
    if sparse_layers(model, msgspec.structs.replace(way.method, dense_layers=0)):
        return f"all that it could select in are among the first {first}: lower dense_layers"
    return "all of the model's have a sliding window"


def prompts(engine: Engine, sample: Sample, answer_tokens: int) -> list[Asked]:
    """The turns of a sample, as tokens.

    Raises:
        PromptError: one has too few tokens, or too many for the model or `cache_bytes`.
    """
    shape, found = engine.model.shape, ask(engine.tokenizer, sample)
    positions, limit = shape.max_positions, engine.config.cache_bytes
    for asked in found:
        if asked.tokens + answer_tokens > positions:
            raise PromptError(
                f"{sample.id} has {asked.tokens} tokens, and {answer_tokens} are for the answer: "
                f"the model takes {positions}; ask for a shorter sample"
            )
        if (needed := (asked.tokens + answer_tokens) * shape.kv_bytes_per_token) > limit:
            raise PromptError(
                f"{sample.id} needs {needed} bytes of KV, cache_bytes is {limit}: raise it"
            )
    return found


def trials(
    engine: Engine, sample: Sample, asked: Sequence[Asked], room: int, question_tokens: int
) -> Iterator[Trial]:
    """Every turn of a sample, one at a time; those with the same context share its reading.

    Args:
        asked: see `prompts`.
        room: tokens of the answer.
        question_tokens: that are left for decode at most, at least one; those before are read
            with the context.
    """
    context: Context | None = None
    read: tuple[int, ...] = ()
    for turn, one in enumerate(asked):
        prompt = one.context + one.question
        start = max(len(one.context), len(prompt) - question_tokens)
        if context is None or prompt[:start] != read:
            read = prompt[:start]
            context = Context(engine.model, read)
        question = prompt[start:]
        yield Trial(engine, sample, turn, one, context, question, len(question) + room)


def failed(sample: Sample, suite: str, ways: Sequence[Way], error: Exception) -> list[Record]:
    """Records of a sample that cannot be asked."""
    turns = range(len(sample.turns))
    return [
        Record.of(sample, turn, way.name, way.budget, suite=suite, error=one_line(error))
        for turn in turns
        for way in ways
    ]


def one_line(error: Exception) -> str:
    """What a record says of one of `FAILURES`, so that a run goes on.

    A RuntimeError is raised again, unless it is what torch says when there is no memory.
    """
    if isinstance(error, RuntimeError) and "memory" not in str(error):
        raise error
    return " ".join(str(error).split()) or type(error).__name__
