"""From scores to the tokens that are taken: group reduction, what is always kept, top-k, top-p."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Policy:
    """How many tokens a KV head attends to, and which of them are not a matter of scores.

    Args:
        budget: tokens of each KV head and step, all counted: sinks, window, outliers, selected.
        sinks: leading tokens always kept (StreamingLLM, Xiao et al. 2023).
        window: trailing tokens always kept.
        reduce: how the query heads of a group agree: the largest of their attention
            probabilities (ShadowKV, 2024: finds needles), or their sum (RetroInfer, 2025).
        top_p: take as few tokens as hold this share of the estimated attention, but no fewer
            than `least` and no more than `budget` (Twilight, 2025); None takes `budget`.
        least: see `top_p`.
    Raises:
        ValueError: for a setting out of range; names it.
    """

    budget: int
    sinks: int = 4
    window: int = 16
    reduce: Literal["max", "sum"] = "max"
    top_p: float | None = None
    least: int = 64

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"need sinks >= 0 and window >= 1, got {self.sinks}, {self.window}")
        if self.budget < self.sinks + self.window:
            raise ValueError(
                f"budget {self.budget} does not hold {self.sinks} sinks and a window of "
                f"{self.window}: raise budget, or lower sinks or window"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def group_scores(
    scores: Float[Tensor, "Hq U"],
    num_kv_heads: int,
    scale: float,
    reduce: Literal["max", "sum"] = "max",
) -> Float[Tensor, "Hk U"]:
    """Logarithm of each unit's attention probability, over the query heads of a KV head.

    Every query head is normalised by itself first, so that one with large scores does not decide
    for its group.
    """
    logs = (scores.float() * scale).log_softmax(-1).unflatten(0, (num_kv_heads, -1))
    return logs.amax(1) if reduce == "max" else logs.logsumexp(1)


def top_tokens(
    scores: Float[Tensor, "Hq U"],
    policy: Policy,
    *,
    num_kv_heads: int,
    length: int,
    scale: float,
    unit: int = 1,
    outliers: Int[Tensor, "Hk S"] | None = None,
) -> Int[Tensor, "Hk K"]:
    """The tokens each KV head attends to, ascending; the same number for every head.

    Of units with several tokens the last one taken may be taken in part, so that every method
    fetches exactly what its budget says. Equal scores: the later token wins.

    Args:
        length: tokens there are; `scores` has one column for every `unit` of them, begun or full.
        scale: factor on scores before their softmax.
        outliers: tokens kept besides sinks and window.
    Raises:
        ValueError: if outliers, sinks and window do not fit the budget.
    """
    grouped = group_scores(scores, num_kv_heads, scale, policy.reduce)
    if unit > 1:
        grouped = grouped.repeat_interleave(unit, 1)
    grouped = grouped[:, :length]
    budget = min(policy.budget, length)
    if policy.top_p is not None:
        kept = policy.sinks + policy.window + (0 if outliers is None else outliers.shape[1])
        budget = _needed(grouped, policy, budget, kept)
    return _best(_forced(grouped, policy, outliers, budget), budget)


def _needed(grouped: Tensor, policy: Policy, budget: int, kept: int) -> int:
    """How many tokens hold `top_p` of the estimated attention in every KV head, besides `kept`."""
    assert policy.top_p is not None
    share = grouped.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    most = int((share < policy.top_p).sum(-1).max()) + 1
    return min(budget, max(policy.least, kept + most))


def _forced(
    grouped: Tensor, policy: Policy, outliers: Tensor | None, budget: int
) -> Float[Tensor, "Hk T"]:
    """Scores in which what must be taken is infinite."""
    length = grouped.shape[1]
    forced = (
        grouped.nan_to_num(nan=-torch.inf, neginf=torch.finfo(torch.float32).min) + 0.0
    )  # no -0
    forced[:, : policy.sinks] = torch.inf
    forced[:, max(0, length - policy.window) :] = torch.inf
    if outliers is not None and outliers.shape[1]:
        forced.scatter_(1, outliers, torch.inf)
        most = policy.sinks + policy.window + outliers.shape[1]
        if most > budget and (most := int(forced.isposinf().sum(-1).max())) > budget:
            raise ValueError(
                f"sinks, window and outliers take {most} tokens, the budget is {budget}: "
                "raise budget, or lower outliers"
            )
    return forced


def _best(scores: Float[Tensor, "Hk T"], count: int) -> Int[Tensor, "Hk K"]:
    """Ids of the `count` largest, ascending; of equal ones the later, on every device."""
    if count >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    bits = scores.contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of floats
    keys = (ordered << 32) + torch.arange(scores.shape[1], device=scores.device)
    found = keys.topk(count, sorted=False).values & 0xFFFFFFFF
    return found.sort(-1).values
