"""Needles in real text: the prompts, the questions through sparse decode, and what was right.

A document is read densely, once. Every question then starts from that same context and goes token
by token through the decode path, as does its answer: what is judged is the choice of tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import torch

from engine.cache import Cache, SparseStats
from engine.decode import decode
from engine.demo.haystack import Fact, Haystack
from engine.engine import Engine
from engine.errors import PromptError
from engine.method import Method
from engine.model.pieces import Model
from engine.rag.question import prompt
from engine.sparse.cache import pool_shape
from evals.context import Context
from kvstore.pool.device import DeviceTier
from retrieval.lowrank import Gram, RankChoice, choose_rank
from retrieval.select import Policy

BATCH = 16  # questions decoded at once, each with a copy of the context
CALIBRATION = 8  # questions that a rank is chosen with
FITS = 4  # texts tried until one has the length that was asked for


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one needle: tokens that follow the context."""

    fact: Fact
    tokens: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Needles:
    """A text with needles in it, as tokens, and a question about each."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]

    @classmethod
    def build(cls, engine: Engine, *, tokens: int, needles: int, seed: int) -> "Needles":
        """Reference pages of the Python language with needles spread over their whole length.

        Args:
            tokens: of the context at most, the first one of the template included; a few less
                where no text fits exactly.
            seed: where the pages start, and which needles are hidden where.
        Raises:
            ConfigError: too few tokens for so many needles.
            PromptError: the template does not put the question behind the text.
        """
        asked = tokens
        found: tuple[Haystack, list[int]] | None = None
        for _ in range(FITS):
            hay = Haystack.build(engine.tokenizer, tokens=asked, facts=needles, seed=seed)
            context = prompt(engine, "", hay.text)
            asked += tokens - len(context)
            if len(context) <= tokens and (found is None or len(context) > len(found[1])):
                found = hay, context
        assert found is not None, "a haystack has at most the tokens that were asked for"
        hay, context = found
        asking = (_question(engine, hay.text, context, fact) for fact in hay.facts)
        return cls(tuple(context), tuple(asking))


def _question(engine: Engine, text: str, context: list[int], fact: Fact) -> Question:
    whole = prompt(engine, text, fact.question)
    if whole[: len(context)] != context:
        raise PromptError("the model's chat template does not put the question behind the text")
    value = engine.tokenizer(f" {fact.value}", add_special_tokens=False)["input_ids"]
    return Question(fact, tuple(whole[len(context) :]), len(value))


@torch.inference_mode()
def low_rank(
    engine: Engine, needles: Needles, ranks: Sequence[int], tolerance: float
) -> list[RankChoice]:
    """For each layer the least rank of keys that keeps what questions and answers attend to.

    The queries are those of the last tokens of some questions with their answers behind the text,
    each of which sees the whole text; see `retrieval.lowrank.choose_rank`.
    """
    context, model = Context(engine.model, needles.context), engine.model
    length = context.length
    asked: list[int] = []
    for question in needles.questions[:: max(1, len(needles.questions) // CALIBRATION)]:
        asked += question.tokens
        asked += engine.tokenizer(f" {question.fact.value}.", add_special_tokens=False)["input_ids"]
    context.read(asked)
    return [_layer_rank(context, i, length, ranks, tolerance) for i in range(len(model.layers))]


def _layer_rank(
    context: Context, number: int, length: int, ranks: Sequence[int], tolerance: float
) -> RankChoice:
    layer, shape = context.model.layers[number], context.model.shape
    keys, queries = context.unrotated(number, length), context.queries[number]
    gram = Gram(shape.num_kv_heads, shape.head_dim, shape.device)
    gram.accumulate(keys)
    places = torch.arange(context.length - queries.shape[1], context.length)
    table = layer.rope.table(torch.arange(length))
    return choose_rank(
        gram,
        keys,
        context.view(number, length).v,
        layer.rope.rotate(queries, layer.rope.table(places)),
        ranks=ranks,
        tolerance=tolerance,
        scale=layer.attention.scale,
        rotate=lambda x: layer.rope.rotate(x, table),
        dtype=shape.dtype,
    )


@dataclass(frozen=True, slots=True)
class Score:
    """How many questions were answered right, and what each step attended to.

    Args:
        attended: tokens of a KV head, on average over questions, steps, layers and heads; None
            if that was all of them.
    """

    right: tuple[bool, ...]
    attended: float | None


def ask(
    engine: Engine,
    context: Context,
    questions: Sequence[Question],
    method: Method,
    policy: Policy | None = None,
) -> Score:
    """Every question on its own, from the same context; greedy answers, digit for digit.

    Args:
        policy: takes the place of the method's, for rules that no method has.
    """
    room = max(len(q.tokens) + q.answer_tokens for q in questions)
    parts = [questions[i : i + BATCH] for i in range(0, len(questions), BATCH)]
    if not method.sparse:
        dense = [_answered(engine, part, lambda: context.dense(room)) for part in parts]
        return Score(tuple(x for answers in dense for x, _ in answers), None)
    shape = pool_shape(engine.model, method)
    blocks = -(-(context.length + room) // shape.block_tokens)
    with closing(DeviceTier(shape, (BATCH + 1) * blocks * shape.block_bytes)) as pool:
        make = partial(context.sparse, method, pool, policy)
        answers = [x for part in parts for x in _answered(engine, part, make)]
    counts = [stats for _, stats in answers if stats is not None]
    selected, steps = sum(x.selected for x in counts), sum(x.steps for x in counts)
    heads = engine.model.shape.num_layers * engine.model.shape.num_kv_heads
    return Score(tuple(right for right, _ in answers), selected / steps / heads)


def _answered(
    engine: Engine, questions: Sequence[Question], make: Callable[[], Cache]
) -> list[tuple[bool, SparseStats | None]]:
    """Whether each was answered right, and what its cache counted; decoded as one batch."""
    with ExitStack() as stack:
        caches = [stack.enter_context(closing(make())) for _ in questions]
        said = _continued(engine.model, caches, questions)
        texts = map(engine.tokenizer.decode, said)
        rights = [q.fact.answered_by(text) for q, text in zip(questions, texts, strict=True)]
        return [(x, cache.stats) for x, cache in zip(rights, caches, strict=True)]


def _continued(
    model: Model, caches: Sequence[Cache], questions: Sequence[Question]
) -> list[list[int]]:
    """Greedy answers. Where one is complete before others are, its request goes on unheard."""
    said = [list(q.tokens) for q in questions]
    for i in range(max(len(q.tokens) + q.answer_tokens for q in questions) - 1):
        newest = torch.tensor([tokens[i] for tokens in said], device=model.shape.device)
        best = decode(model, caches, newest).argmax(-1).tolist()
        for tokens, token in zip(said, best, strict=True):
            if len(tokens) == i + 1:
                tokens.append(token)
    ends = [(len(q.tokens), len(q.tokens) + q.answer_tokens) for q in questions]
    return [tokens[start:stop] for tokens, (start, stop) in zip(said, ends, strict=True)]
