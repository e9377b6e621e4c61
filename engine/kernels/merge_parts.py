"""Attention over disjoint parts of contexts, merged: of a batch, as kernels leave it.

    lse = log of the sum over n of exp(lse[n]),    out = sum over n of exp(lse[n] - lse) out[n]

    outs [n, B, Hq, D], lses [n, B, Hq]: contiguous, the parts of a query B Hq rows apart

Softmax is a weighted mean, so parts average by their shares of the sum of exponentials. Kernels
that cut a context into parts, so that one request fills a GPU (flash decoding, Dao et al. 2023),
share what is here: an online softmax (Milakov & Gimelshein 2018), in powers of 2, and its end.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from native.gpu import Build, on_gpu

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PROGRAMS = 4 * 132  # as many as a Hopper GPU runs at once, four of them on a multiprocessor
MERGED = 16  # parts read at once by the program that merges them


class Partials(NamedTuple):
    """Attention of a batch over a part of its contexts, and what it takes to merge it."""

    out: Float[Tensor, "B Hq D"]  # 0 where there is nothing to attend to
    lse: Float32[Tensor, "B Hq"]  # -inf there


def finite(lse: Float32[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
    """To be taken off logits: of logits that are all -inf, something that leaves them so."""
    return lse.clamp_min(torch.finfo(torch.float32).min)


def merge_parts(outs: Float[Tensor, "n B Hq D"], lses: Float32[Tensor, "n B Hq"]) -> Partials:
    """Attention over all tokens from that over n disjoint parts of them; in the type of `outs`.

    What `engine.attention.merge` does for a request. Parts of nothing (-inf) are not read.
    """
    if on_gpu(outs, lses):
        return merge_parts_triton(outs, lses)
    return merge_parts_torch(outs, lses)


def merge_parts_torch(outs: Float[Tensor, "n B Hq D"], lses: Float32[Tensor, "n B Hq"]) -> Partials:
    """The definition."""
    lse = lses.logsumexp(0)
    weights = (lses - finite(lse)).exp()[..., None]
    shares = torch.where(weights == 0, 0, weights * outs.float())
    return Partials(shares.sum(0).to(outs.dtype), lse)


def merge_parts_triton(
    outs: Float[Tensor, "n B Hq D"], lses: Float32[Tensor, "n B Hq"]
) -> Partials:
    """The same by a kernel."""
    return merged(Partials(outs.contiguous(), lses.contiguous()), outs.dtype)


def merged(parts: Partials, dtype: torch.dtype) -> Partials:
    """The kernel's merge of parts [n, B, Hq, ...]; one part is what it is."""
    outs, lses = parts
    count, batch, heads, dim = outs.shape
    if count == 1 and outs.dtype == dtype:
        return Partials(outs[0], lses[0])
    out = torch.empty(outs.shape[1:], dtype=dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    _merge[(batch * heads,)](
        *(outs, lses, out, lse, count, batch * heads),
        **{"D": dim, "DP": triton.next_power_of_2(dim), "NP": triton.next_power_of_2(count)},
        BLOCK=MERGED,
    )
    return Partials(out, lse)


def cut(count: int, rows: int, block: int) -> tuple[int, int]:
    """Into how many parts each of `rows` runs of `count` is cut, and how long they are."""
    blocks = -(-count // block)
    parts = max(1, min(blocks, PROGRAMS // rows))
    part = -(-blocks // parts) * block
    return -(-count // part), part


def empty_parts(q: Float[Tensor, "B Hq D"], parts: int) -> Partials:
    """Room for partial results [parts, B, Hq, ...]: in fp32, unless there is nothing to merge."""
    dtype = torch.float32 if parts > 1 else q.dtype
    out = torch.empty(parts, *q.shape, dtype=dtype, device=q.device)
    return Partials(out, torch.empty(out.shape[:3], dtype=torch.float32, device=q.device))


@triton.jit
@no_type_check
def softmax_step(scores, top, total):
    """Weights 2^(score - new top) of more scores, the factor on what was summed so far, new sums.

    Rows that have seen nothing but -inf have a top of -inf, a total of 0 and weights of 0.
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
@no_type_check
def store_part(
    out, lse, first, acc, top, total,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """What G queries make of their part; `first` is the number of the first of them."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    row = first + g
    here = (g < G)[:, None] & (d < D)[None, :]
    total = tl.where(total == 0, 1.0, total)  # acc is 0 then, and top -inf
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * D + d[None, :], result, mask=here)
    tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=g < G)


@triton.jit
@no_type_check
def _merge(
    outs, lses, out, lse, N, rows,
    D: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All parts of one query."""
    row, every, d = tl.program_id(0), tl.arange(0, NP), tl.arange(0, DP)
    logs = tl.load(lses + every * rows + row, mask=every < N, other=float("-inf"))
    top = tl.max(logs, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((logs - base) * LOG2E), 0)
    acc = tl.zeros([DP], tl.float32)
    for at in range(0, N, BLOCK):
        n = at + tl.arange(0, BLOCK)
        log = tl.load(lses + n * rows + row, mask=n < N, other=float("-inf"))
        weight = tl.exp2((log - base) * LOG2E)
        there = (weight > 0)[:, None] & (d < D)[None, :]
        place = outs + (n * rows + row).to(tl.int64)[:, None] * D + d[None, :]
        acc += tl.sum(weight[:, None] * tl.load(place, mask=there, other=0.0), 0)
    total = tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + row, top + tl.log2(total) * LN2)


def _merge_build() -> Build:
    signature = {"outs": "*fp32", "lses": "*fp32", "out": "*bf16", "lse": "*fp32"}
    signature |= {"N": "i32", "rows": "i32"}
    constants = {"D": 128, "DP": 128, "NP": 64, "BLOCK": MERGED}
    signature |= dict.fromkeys(constants, "constexpr")
    return Build("merge_parts, 64 parts, D=128", _merge, signature, constants)


AOT: list[Build] = [_merge_build()]
