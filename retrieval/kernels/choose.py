"""The tokens that are taken: ids of the largest keys of each row, ascending.

    k = min(budget, length)
    least = the k-th largest key of the row
    taken: the keys above `least`, and of those that equal it the last ones, k in all

`least` is made two bits at a time from the highest: the largest digit stays with which k keys reach
the number. Where exactly k keys reach it, the rest of its bits does not matter. Counts are three
comparisons and additions for a key that is in a register; `tl.histogram` of 256 bins, which would
find 8 bits at a time, asks each warp for 8 votes and 8 counts of bits to every 32 keys, and does
not cost less.

    keys [B, Hk, T]     ids [B, Hk, K]  written once

A row of up to 16,384 keys belongs to one program of 512 threads, that keeps 4,096 of them in
registers and reads the rest from its processor's cache. Longer rows are cut, see `cut.py`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor
from torch.nn import functional as F

from native.gpu import Build, on_gpu
from retrieval.kernels.cut import RUN, WARPS, choose_cut, fill, least_of, sets_of, take
from retrieval.kernels.group import keys as keys_of
from retrieval.kernels.scores import Scores
from retrieval.select import Policy

WHOLE = 16384  # keys of rows that are not cut


def best_tokens(
    scores: Scores,
    lengths: Int32[Tensor, " B"],
    policy: Policy,
    *,
    num_kv_heads: int,
    scale: float,
    unit: int = 1,
    outliers: Int32[Tensor, "B Hk S"] | None = None,
) -> Int32[Tensor, "B Hk K"]:
    """Ids of `retrieval.select.top_tokens` for every slot; -1 behind its min(budget, length).

    Args:
        scale: factor on scores before their softmax, the one that `scores` was made with.
        unit: tokens that share a score.
        outliers: tokens kept besides sinks and window; -1 for none. If the budget does not hold
            all these, the last of them are taken.
    Raises:
        ValueError: if the policy asks for top_p, whose number of tokens is not known in advance.
    """
    if policy.top_p is not None:
        raise ValueError(
            f"a batch takes the same number of tokens in every step: unset top_p ({policy.top_p})"
        )
    keys = keys_of(
        scores,
        lengths,
        num_kv_heads=num_kv_heads,
        scale=scale,
        sinks=policy.sinks,
        window=policy.window,
        reduce=policy.reduce,
        unit=unit,
        outliers=outliers,
    )
    return choose(keys, lengths, policy.budget)


def choose(
    keys: Int32[Tensor, "B Hk T"], lengths: Int32[Tensor, " B"], budget: int
) -> Int32[Tensor, "B Hk K"]:
    """Ids of the min(budget, length) largest keys of every row, ascending, -1 behind them.

    Of equal keys the later tokens are taken. K is the budget. Keys at and behind a length do not
    count.

    Args:
        keys: contiguous.
    """
    if on_gpu(keys, lengths):
        return choose_triton(keys, lengths, budget)
    return choose_torch(keys, lengths, budget)


def choose_torch(
    keys: Int32[Tensor, "B Hk T"], lengths: Int32[Tensor, " B"], budget: int
) -> Int32[Tensor, "B Hk K"]:
    """The definition."""
    capacity, length = keys.shape[2], lengths[:, None, None]
    token = torch.arange(capacity, device=keys.device)
    unique = (keys.long() << 32) + (token + 1)  # of equal keys the later is the larger
    unique = unique.where(token < length, torch.iinfo(torch.int64).min)
    found = unique.topk(min(budget, capacity), sorted=False).indices
    ids = found.where(found < length, capacity).sort(-1).values
    ids = ids.where(ids < capacity, -1).int()
    return F.pad(ids, (0, budget - ids.shape[2]), value=-1)


def choose_triton(
    keys: Int32[Tensor, "B Hk T"], lengths: Int32[Tensor, " B"], budget: int
) -> Int32[Tensor, "B Hk K"]:
    """One launch for short rows, five for long ones."""
    if keys.shape[2] <= max(WHOLE, 2 * sets_of(budget)):
        return choose_whole(keys, lengths, budget)
    return choose_cut(keys, lengths, budget)


def choose_whole(
    keys: Int32[Tensor, "B Hk T"], lengths: Int32[Tensor, " B"], budget: int
) -> Int32[Tensor, "B Hk K"]:
    """One program for each row."""
    assert keys.is_contiguous(), "rows lie side by side"
    batch, heads, capacity = keys.shape
    out = torch.empty(batch, heads, budget, dtype=torch.int32, device=keys.device)
    whole_kernel[batch * heads,](
        keys, lengths, out, capacity, budget, heads, RUN=RUN, num_warps=WARPS
    )
    return out


@triton.jit
@no_type_check
def whole_kernel(keys, lengths, out, capacity, budget, heads, RUN: tl.constexpr):
    """The ids of a row."""
    row = tl.program_id(0)
    length = tl.load(lengths + row // heads)
    k = tl.minimum(length, budget)
    keys += row.to(tl.int64) * capacity
    out += row.to(tl.int64) * budget
    least, count = least_of(keys, length, capacity, k, RUN)
    take(keys, keys, False, length, capacity, least, count - k, out, RUN // 2)
    fill(out, k, budget, RUN)


AOT = [
    Build(
        name="choose, whole rows",
        kernel=whole_kernel,
        signature=dict.fromkeys(("keys", "lengths", "out"), "*i32")
        | dict.fromkeys(("capacity", "budget", "heads"), "i32")
        | {"RUN": "constexpr"},
        constants={"RUN": RUN},
        num_warps=WARPS,
    )
]
