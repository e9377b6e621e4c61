"""One prompt of segments, read in full and blended: what blending changes of the answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from engine.blend.repair import BlendConfig, BlendReport
from engine.blend.segments import Segments
from engine.cache import SequenceCache
from engine.decode import decode
from engine.engine import Engine
from engine.prefill import prefill
from engine.request import Request, Running
from evals.rag import segments
from evals.task import Sample


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prompt that was read, and what the model expects next.

    Args:
        report: of the blend; None where the prompt was read in full.
    """

    run: Running
    logits: Float[Tensor, " vocab"]
    report: BlendReport | None

    def distance(self, other: "Reading") -> float:
        """KL divergence of the next token from this reading to another, in nats."""
        p, q = (x.logits.double().log_softmax(-1) for x in (self, other))
        return float(F.kl_div(q, p, reduction="sum", log_target=True))


@contextmanager
def in_full(engine: Engine, sample: Sample) -> Iterator[Reading]:
    """The prompt of a sample, nothing of it reused. PromptError if the model cannot take it."""
    run = _running(engine, sample, BlendConfig())
    cache = run.cache = SequenceCache(engine.model.shape, run.capacity)
    tokens = torch.tensor(run.request.prompt, device=engine.model.shape.device)
    try:
        yield Reading(run, prefill(engine.model, cache, tokens), None)
    finally:
        run.release()


@contextmanager
def blended(engine: Engine, sample: Sample, config: BlendConfig) -> Iterator[Reading]:
    """The prompt of a sample of chunks that a store has, or gets now."""
    run = _running(engine, sample, config)
    try:
        yield Reading(run, engine.blending.prefill(run), run.stats.blend)
    finally:
        run.release()


def answer(engine: Engine, reading: Reading) -> str:
    """The greedy answer that follows."""
    run, row = reading.run, reading.logits
    while run.step(row).completion is None:
        tokens = torch.tensor(run.tokens[-1:], device=row.device)
        assert run.cache is not None
        row = decode(engine.model, [run.cache], tokens)[0]
    return run.completion().text or ""


def _running(engine: Engine, sample: Sample, config: BlendConfig) -> Running:
    asked: Segments = segments(engine.tokenizer, sample)
    turn, shape = sample.turns[0], engine.model.shape
    request = Request(asked.tokens, turn.max_new_tokens, stop=turn.stop)
    request.check(shape.vocab, shape.max_positions)
    limit = min(turn.max_new_tokens, shape.max_positions - len(asked.tokens) + 1)
    return Running(
        request,
        eos=engine.model.eos,
        limit=limit,
        tokenizer=engine.tokenizer,
        segments=asked,
        blend=config,
    )
