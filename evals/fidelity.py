"""How far each method is from dense attention on one sample: needs no model that answers well.

The context is read densely, once. What follows, the question and dense's own greedy answer, goes
token by token through the decode path of every method (teacher forcing), and at every step:

    error          |o - ô| / |o| of attention's output in a layer, ô the method's
    mass           attention on the tokens that a KV head takes, 0..1, over its query heads
    recall         the same in shares of the oracle's, which takes as many tokens. Where query
                   heads disagree, the oracle's rule (the largest of their probabilities) is not
                   that of the largest sum: shares a little above 1 are possible
    kl             KL(dense ‖ method) of next-token distributions, nats
    top1           share of steps whose likeliest token is dense's
    greedy_prefix  tokens of the greedy answer before the first that is not dense's; all of them
                   where none differs. Free-running greedy would say the same: up to there, it is
                   fed what dense said

Measures are means over steps, and the first three over layers and KV heads; layers with a sliding
window, in which nothing is selected, are left out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from engine.cache import Cache, SequenceCache
from engine.decode import decode
from engine.engine import Engine
from engine.errors import ConfigError
from engine.method import Method
from engine.model.pieces import Model
from engine.sparse.cache import sparse_layers
from evals.cost import cost
from evals.observed import Kept, Observed
from evals.record import Record
from evals.task import Sample
from evals.trial import FAILURES, QUESTION_TOKENS, Trial, failed, one_line, prompts, trials
from evals.ways import Way

SUITE = "fidelity"


class Path(NamedTuple):
    """What dense says, step by step.

    tokens: fed, one a step: the question, then the greedy answer but for its last token.
    logits: after each of them.
    asked: steps before the answer's first token is known, that one included.
    """

    tokens: tuple[int, ...]
    logits: Float[Tensor, "S vocab"]
    asked: int


class Distance(NamedTuple):
    """Of a method's next-token distributions to dense's, at every step."""

    kl: Float[Tensor, " S"]
    same: Bool[Tensor, " S"]  # the likeliest token

    def measures(self, asked: int) -> dict[str, float]:
        """See above; the answer's first token is that after step `asked`, counted from 1."""
        answer = self.same[asked - 1 :]
        return {
            "kl": float(self.kl.mean()),
            "top1": float(self.same.float().mean()),
            "greedy_prefix": float(answer.long().cumprod(0).sum()),
        }


def measure(
    engine: Engine,
    sample: Sample,
    ways: Sequence[Way],
    *,
    answer_tokens: int = 32,
    question_tokens: int = QUESTION_TOKENS,
    per_head: bool = False,
) -> Iterator[Record]:
    """A record for every turn, method and budget; dense by itself first, as the floor of rounding.

    Memory is that of three copies of the context's KV and one index a layer for each method.

    Args:
        ways: dense and methods at budgets; see `evals.ways`.
        answer_tokens: of dense's greedy answer.
        question_tokens: that go through the decode path; of a longer question its last ones, and
            what is before them is read with the context.
        per_head: also give measures of every layer and KV head, as "recall/L3/H1".
    Raises:
        ConfigError: a setting out of range.
    """
    if min(answer_tokens, question_tokens) < 1:
        raise ConfigError("answer_tokens and question_tokens must be at least 1")
    try:
        asked = prompts(engine, sample, answer_tokens)
    except FAILURES as error:
        yield from failed(sample, SUITE, ways, error)
        return
    for trial in trials(engine, sample, asked, answer_tokens, question_tokens):
        exact = trial.context.dense(trial.room)
        path = dense_path(trial.model, exact, trial.question, answer_tokens)
        for way in ways:
            yield _record(trial, way, path, exact, per_head)


def _record(trial: Trial, way: Way, path: Path, exact: SequenceCache, per_head: bool) -> Record:
    layers = observable(trial.model, way.method)
    try:
        with trial.cache(way) as cache:
            observed = Observed(cache, exact, layers)
            distance = follow(trial.model, observed, path)
            costs = cost(trial.model, cache, trial.context.length)
    except FAILURES as error:
        return trial.record(SUITE, way, error=one_line(error))
    found = {"steps": float(len(path.tokens))} | distance.measures(path.asked)
    if layers:
        found |= attention_measures(observed.kept, layers, per_head=per_head)
    return trial.record(SUITE, way, measures=found, **costs)


def observable(model: Model, method: Method) -> list[int]:
    """Layers in which a method selects; for dense, all that have no window."""
    if method.sparse:
        return sparse_layers(model, method)
    return [i for i, layer in enumerate(model.layers) if layer.attention.window is None]


def attention_measures(kept: Kept, layers: Sequence[int], *, per_head: bool) -> dict[str, float]:
    """Means over steps, layers and KV heads; `per_head`, over steps alone beside them."""
    rows = {"error": kept.error, "mass": kept.mass, "recall": kept.mass / kept.best}
    found = {name: float(x.mean()) for name, x in rows.items()}
    if per_head:
        for name, x in rows.items():
            for i, heads in zip(layers, x.mean(0).tolist(), strict=True):
                found |= {f"{name}/L{i}/H{head}": mean for head, mean in enumerate(heads)}
    return found


@torch.inference_mode()
def dense_path(
    model: Model, cache: SequenceCache, question: Sequence[int], answer_tokens: int
) -> Path:
    """A question behind what the cache holds, and the greedy answer, whether or not it ends before.

    Args:
        question: tokens, at least one.
        answer_tokens: of the answer, at least one.
    """
    tokens, rows = list(question), []
    for i in range(len(question) + answer_tokens - 1):
        rows.append(_step(model, cache, tokens[i]))
        if i + 1 >= len(question):
            tokens.append(int(rows[-1].argmax()))
    return Path(tuple(tokens[:-1]), torch.stack(rows), len(question))


@torch.inference_mode()
def follow(model: Model, cache: Cache, path: Path) -> Distance:
    """Feed a cache what dense was fed."""
    found = []
    for token, want in zip(path.tokens, path.logits, strict=True):
        got = _step(model, cache, token)
        p, q = (row.double().log_softmax(-1) for row in (want, got))
        found.append(
            (F.kl_div(q, p, reduction="sum", log_target=True), got.argmax() == want.argmax())
        )
    kl, same = (torch.stack(x) for x in zip(*found, strict=True))
    return Distance(kl.float(), same)


def _step(model: Model, cache: Cache, token: int) -> Float[Tensor, " vocab"]:
    return decode(model, [cache], torch.tensor([token], device=model.shape.device))[0]
