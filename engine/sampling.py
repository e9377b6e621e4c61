"""From logits to a token."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from engine.errors import ModelError, PromptError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most probable token; higher is more random.
        top_k: only the k most probable tokens; 0 for all.
        top_p: only the most probable tokens that together reach this probability.
        seed: makes the draw repeatable; None draws anew every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("temperature", Real), ("top_p", Real), ("top_k", Integral)):
            if not isinstance(value := getattr(self, name), kind):
                raise PromptError(f"{name} must be a number, got {value!r}")
        if not isinstance(self.seed, Integral | None):
            raise PromptError(f"seed must be a whole number, got {self.seed!r}")
        if not 0 <= self.temperature < float("inf"):
            raise PromptError(f"temperature must be a number from 0 up, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise PromptError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise PromptError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def generator(self) -> torch.Generator:
        """A fresh source of randomness for one request."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(self.seed))
        return generator


def sample(logits: Float[Tensor, " vocab"], sampling: Sampling, generator: torch.Generator) -> int:
    """One token id. The draw is made on the CPU, so a seed gives the same token everywhere."""
    scores = logits.double().cpu()
    best = scores.max()
    refuse_infinite("logits", best)
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = (scores - best) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    return int(
        torch.multinomial(_nucleus(scores.softmax(-1), sampling.top_p), 1, generator=generator)
    )


def refuse_infinite(what: str, numbers: Tensor | None) -> None:
    """ModelError for numbers of which the largest or smallest is infinite, or any is no number."""
    if numbers is not None and not all(bool(end.isfinite()) for end in numbers.aminmax()):
        raise ModelError(
            f"the model's {what} are not finite: load it with dtype bfloat16 or float32"
        )


class Likely(NamedTuple):
    """A token and the logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a chosen token was, by the model's own distribution (temperature 1, no cuts).

    Args:
        top: the most probable tokens, best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[Likely, ...] = ()


def logprobs(logits: Float[Tensor, " vocab"], token: int, top: int) -> TokenLogprob:
    """Of the token that was chosen, and of the `top` best."""
    logs = logits.double().cpu().log_softmax(-1)
    best = logs.topk(min(top, len(logs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logs[token]), tuple(Likely(*pair) for pair in pairs))


def _nucleus(probs: Float[Tensor, " vocab"], top_p: float) -> Float[Tensor, " vocab"]:
    """`probs` without the tail beyond `top_p`; the most probable token always stays."""
    if top_p == 1:
        return probs
    ordered, order = probs.sort(descending=True)
    beyond = ordered.cumsum(0) - ordered >= top_p
    return probs.index_fill(0, order[beyond], 0.0)
