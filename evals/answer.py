"""Answers to one sample's questions by every method, and what they cost.

The context is read densely, once, for all methods and turns. Every turn then starts from it and
goes token by token through the method's decode path, its question as well as its answer: what is
judged is the choice of tokens. Only the floor (`NO_CONTEXT`) reads its question as a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import Cache
from engine.decode import decode
from engine.engine import Engine
from engine.errors import PromptError
from engine.request import Request, Running
from engine.sparse.cache import pool_shape, sparse_layers
from evals.context import Context, index_name
from evals.cost import cost
from evals.facts import peak_bytes, reset_peak
from evals.prompt import Asked, ask, ask_alone
from evals.record import NO_CONTEXT, Record
from evals.task import Sample, Turn
from evals.trial import FAILURES, failed
from evals.ways import Way
from kvstore.pool.pinned import PinnedTier

BATCH = 16  # turns decoded at once, each with a copy of the context


class Reply:
    """One turn on its way: the question's tokens go in, then the answer's."""

    def __init__(self, engine: Engine, turn: Turn, asked: Asked, cache: Cache) -> None:
        self.asked, self.cache = asked, cache
        self.run = running(engine, turn, asked)
        self._fed = 0

    @property
    def next(self) -> int:
        """The token to decode."""
        question = self.asked.question
        return question[self._fed] if self._fed < len(question) else self.run.tokens[-1]

    def take(self, logits: Float[Tensor, " vocab"]) -> None:
        """What came of it."""
        self._fed += 1
        if self._fed >= len(self.asked.question):
            self.run.step(logits)


def running(engine: Engine, turn: Turn, asked: Asked) -> Running:
    """A greedy request for a turn's answer. PromptError for one that the model cannot take."""
    request = Request((*asked.context, *asked.question), turn.max_new_tokens, stop=turn.stop)
    positions = engine.model.shape.max_positions
    request.check(engine.model.shape.vocab, positions)
    limit = min(turn.max_new_tokens, positions - asked.tokens + 1)  # the last one is not fed back
    return Running(request, eos=engine.model.eos, limit=limit, tokenizer=engine.tokenizer)


def reply(engine: Engine, replies: Sequence[Reply]) -> None:
    """Decode as one batch until every answer ends."""
    while live := [one for one in replies if one.run.finish_reason is None]:
        tokens = torch.tensor([one.next for one in live], device=engine.model.shape.device)
        rows = decode(engine.model, [one.cache for one in live], tokens)
        for one, row in zip(live, rows, strict=True):
            one.take(row)


class Answers:
    """Of one sample: read when the first way asks for it, answered way by way."""

    def __init__(self, engine: Engine, sample: Sample) -> None:
        self._engine, self._sample = engine, sample

    def records(self, way: Way) -> list[Record]:
        """One of each turn, without scores; where it cannot be asked, with the error.

        Their peak memory is without that of reading the context, whoever asks for it first.
        """
        floor = way.name == NO_CONTEXT
        try:
            if not floor:
                _ = self.context
            reset_peak(self._engine.model.shape.device)
            return list(self._floor(way) if floor else self._answered(way))
        except FAILURES as error:
            return failed(self._sample, self._sample.suite, [way], error)

    @cached_property
    def asked(self) -> list[Asked]:
        """All turns, as tokens."""
        return ask(self._engine.tokenizer, self._sample)

    @cached_property
    def context(self) -> Context:
        """What all turns begin with, read."""
        capacity = self._capacity(self.asked)
        self._refuse("cache_bytes", self._engine.config.cache_bytes, self._kv_bytes(capacity))
        return Context(self._engine.model, self.asked[0].context)

    def _answered(self, way: Way) -> Iterator[Record]:
        capacity, model = self._capacity(self.asked), self._engine.model
        context, config = self.context, self._engine.config
        room = capacity - context.length
        if not sparse_layers(model, way.method):
            left = config.cache_bytes - self._kv_bytes(context.length)
            size = self._batch("cache_bytes", left, self._kv_bytes(capacity))
            yield from self._batches(way, size, lambda: context.dense(room))
            return
        shape = pool_shape(model, way.method)
        each = -(-capacity // shape.block_tokens) * shape.block_bytes
        size = self._batch("pinned_bytes", config.pinned_bytes, each)
        with closing(PinnedTier(shape, size * each)) as pool:
            yield from self._batches(way, size, partial(context.sparse, way.method, pool))

    def _batches(self, way: Way, size: int, make: Callable[[], Cache]) -> Iterator[Record]:
        for start in range(0, len(self.asked), size):
            numbers = range(start, min(start + size, len(self.asked)))
            with ExitStack() as stack:
                caches = [stack.enter_context(closing(make())) for _ in numbers]
                pairs = zip(numbers, caches, strict=True)
                batch = [self._reply(i, self.asked[i], cache) for i, cache in pairs]
                reply(self._engine, batch)
                build_s = self.context.build_s.get(index_name(way.method), 0.0)
                for i, one in zip(numbers, batch, strict=True):
                    yield self._record(way, i, one, self.context.prefill_s, build_s)

    def _floor(self, way: Way) -> Iterator[Record]:
        """Each turn by itself, as its prompt is shared with no other."""
        for i in range(len(self._sample.turns)):
            asked = ask_alone(self._engine.tokenizer, self._sample, i)
            running(self._engine, self._sample.turns[i], asked)  # refuses what is too long
            read = Context(self._engine.model, asked.context)
            one = self._reply(i, asked, read)
            reply(self._engine, [one])
            yield self._record(way, i, one, read.prefill_s, 0.0)

    def _reply(self, number: int, asked: Asked, cache: Cache) -> Reply:
        return Reply(self._engine, self._sample.turns[number], asked, cache)

    def _record(self, way: Way, turn: int, one: Reply, prefill_s: float, build_s: float) -> Record:
        done = one.run.completion()
        found: dict[str, Any] = {
            "prompt_sha256": one.asked.sha256,
            "prompt_tokens": one.asked.tokens,
            "prediction": done.text or "",
            "prefill_s": prefill_s,
            "ttft_s": prefill_s + build_s + done.stats.ttft_s,
            "decode_tok_s": done.stats.decode_tokens_per_s or None,
            "peak_mem": peak_bytes(self._engine.model.shape.device),
        }
        spent = cost(self._engine.model, one.cache, len(one.asked.context))
        return Record.of(self._sample, turn, way.name, way.budget, **found, **spent)

    # memory

    def _capacity(self, asked: Sequence[Asked]) -> int:
        """Tokens that the longest turn may need."""
        pairs = zip(self._sample.turns, asked, strict=True)
        return max(running(self._engine, turn, one).capacity for turn, one in pairs)

    def _kv_bytes(self, tokens: int) -> int:
        return tokens * self._engine.model.shape.kv_bytes_per_token

    def _batch(self, setting: str, has: int, each: int) -> int:
        """How many turns have room at once."""
        self._refuse(setting, has, each)
        return min(BATCH, len(self.asked), has // each)

    def _refuse(self, setting: str, has: int, needed: int) -> None:
        if needed > has:
            raise PromptError(
                f"{self._sample.id} needs {needed} bytes of KV beside its context, {setting} "
                f"leaves {has}: raise {setting}"
            )
