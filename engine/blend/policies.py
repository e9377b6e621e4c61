"""Which blocks of reused KV are computed afresh: one class per policy, each with its source.

A share is charged honestly: over all layers, the tokens whose projections are computed afresh
(those of a probe, too), divided by the tokens that could have been reused. Tokens that have no
stored KV, the question among them, are computed in any case and charged to nobody.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from engine.blend.reuse import BLOCK_TOKENS, Reuse


class Budget:
    """What a policy may still compute, counted in tokens times layers."""

    def __init__(self, share: float, reuse: Reuse, num_layers: int) -> None:
        self.share, self.num_layers = share, num_layers
        self._reusable = reuse.reusable
        self._spent = 0

    @property
    def whole(self) -> bool:
        """Everything may be computed: there is nothing to choose."""
        return self.share >= 1

    @property
    def charged(self) -> float:
        """The share spent so far."""
        return self._spent / max(1, self._reusable * self.num_layers)

    @property
    def left(self) -> float:
        return max(0.0, self.share * self._reusable * self.num_layers - self._spent)

    def behind(self, layer: int) -> float:
        """Tokens that what is left allows in each of the layers after this one."""
        return self.left / max(1, self.num_layers - layer - 1)

    def charge(self, tokens: int) -> None:
        """Take note of tokens computed in one layer."""
        self._spent += tokens


@runtime_checkable
class Policy(Protocol):
    """Chooses blocks. The set that is computed only shrinks, once, from layer to layer.

    probe: whether it must know what the question attends to, which has its price.
    check: the layer where blocks are compared with what is stored, and chosen anew; None: nowhere.
    first: the blocks computed from layer 0 on.
    keep: of these, the blocks computed behind layer `check`; deviation is 0 for all others.
    """

    @property
    def probe(self) -> bool: ...
    @property
    def check(self) -> int | None: ...
    def first(
        self, reuse: Reuse, budget: Budget, relevance: Float[Tensor, " n"]
    ) -> Bool[Tensor, " n"]: ...
    def keep(
        self,
        reuse: Reuse,
        budget: Budget,
        relevance: Float[Tensor, " n"],
        deviation: Float[Tensor, " n"],
    ) -> Bool[Tensor, " n"]: ...


class _Once:
    """A policy that chooses before it has computed anything."""

    probe = False
    check = None

    def keep(
        self,
        reuse: Reuse,
        budget: Budget,
        relevance: Float[Tensor, " n"],
        deviation: Float[Tensor, " n"],
    ) -> Bool[Tensor, " n"]:
        raise AssertionError("no check layer, nothing to choose there")


@dataclass(frozen=True, slots=True)
class Reposition(_Once):
    """Nothing: keys are rotated to where they are (Prompt Cache, Gim et al. 2024)."""

    def first(
        self, reuse: Reuse, budget: Budget, relevance: Float[Tensor, " n"]
    ) -> Bool[Tensor, " n"]:
        return ~reuse.everything


@dataclass(frozen=True, slots=True)
class Boundary(_Once):
    """The first blocks of every chunk, which took it for the text's (EPIC, Hu et al. 2025)."""

    def first(
        self, reuse: Reuse, budget: Budget, relevance: Float[Tensor, " n"]
    ) -> Bool[Tensor, " n"]:
        return best(reuse, -reuse.order.double(), budget.left / budget.num_layers)


@dataclass(frozen=True, slots=True)
class Deviation:
    """The blocks whose values differ most from the stored ones (CacheBlend, Yao et al. 2025).

    All are computed up to the check layer, so no share below (check + 1) / layers is reached.
    """

    check: int = 1
    probe = False

    def first(
        self, reuse: Reuse, budget: Budget, relevance: Float[Tensor, " n"]
    ) -> Bool[Tensor, " n"]:
        return reuse.everything

    def keep(
        self,
        reuse: Reuse,
        budget: Budget,
        relevance: Float[Tensor, " n"],
        deviation: Float[Tensor, " n"],
    ) -> Bool[Tensor, " n"]:
        return best(reuse, deviation, budget.behind(self.check))


@dataclass(frozen=True, slots=True)
class Query(_Once):
    """The blocks that the question attends to (ProphetKV, 2026; QCFuse, 2026)."""

    probe = True

    def first(
        self, reuse: Reuse, budget: Budget, relevance: Float[Tensor, " n"]
    ) -> Bool[Tensor, " n"]:
        return best(reuse, relevance, budget.left / budget.num_layers)


@dataclass(frozen=True, slots=True)
class Union:
    """Boundaries, and of what the question attends to the blocks that deviate most.

    The question names candidates, more than are kept, and only they are computed up to the check
    layer. It lies in the middle: what a token made of the text before it shows in its values only
    behind the layers that found it there. With a check at layer 1, the block that states a
    link to another chunk deviates no more than others yet (`scripts/bench_blend_quality.py` shows
    what becomes of `Deviation`, which checks there).

    Args:
        check: the layer at which candidates are compared with what is stored.
        boundary_tokens: of every chunk's start, as far as a quarter of the budget allows; then
            those of the chunks that the question attends to.
        candidates: as many times the blocks that are kept in the end.
    """

    check: int
    boundary_tokens: int = 16
    candidates: float = 2.0
    probe = True

    def first(
        self, reuse: Reuse, budget: Budget, relevance: Float[Tensor, " n"]
    ) -> Bool[Tensor, " n"]:
        early = min(self.check + 1, budget.num_layers)
        late = budget.num_layers - early
        tokens = self.candidates * budget.left / (self.candidates * early + late)
        most = min(tokens, budget.left / early)
        return self._with_boundary(reuse, relevance, relevance, most, tokens / self.candidates)

    def keep(
        self,
        reuse: Reuse,
        budget: Budget,
        relevance: Float[Tensor, " n"],
        deviation: Float[Tensor, " n"],
    ) -> Bool[Tensor, " n"]:
        tokens = budget.behind(self.check)
        score = relevance * deviation.sqrt()
        return self._with_boundary(reuse, relevance, score, tokens, tokens)

    def _with_boundary(
        self,
        reuse: Reuse,
        relevance: Float[Tensor, " n"],
        score: Float[Tensor, " n"],
        tokens: float,
        kept: float,
    ) -> Bool[Tensor, " n"]:
        """Blocks by score, behind boundaries that take at most a quarter of what is kept."""
        starts = reuse.order * BLOCK_TOKENS < self.boundary_tokens
        edge = best(reuse, relevance.masked_fill(~starts, -1), kept / 4) & starts
        return best(reuse, score.masked_fill(edge, float("inf")), tokens)


def best(reuse: Reuse, score: Float[Tensor, " n"], tokens: float) -> Bool[Tensor, " n"]:
    """The blocks of highest score that have at most so many tokens; of equals, the earlier ones."""
    order = score.sort(descending=True, stable=True).indices
    fit = int((reuse.sizes[order].cumsum(0) <= tokens + 1e-6).sum())
    return (~reuse.everything).index_fill_(0, order[:fit], True)
