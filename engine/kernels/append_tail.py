"""The newest token of every request, taken into the summary of its cluster (`retrieval.estimate`).

    share   = 1 / (n + 1),    n = position mod N tokens that the cluster has already
    mean    = mean + share (new - mean)                                      of keys, and of values
    spread  = (1 - share) (spread + share |new key - mean key|² / D)         of keys

(Chan, Golub and LeVeque 1979); the first token of a cluster is its summary, with a spread of 0.

    summaries [B, Hk, C, 2 D + 1]: mean_k | mean_v | spread, changed in place

One program a KV head: torch makes 25 launches of it, on as few numbers.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from native.gpu import Build, on_gpu
from retrieval.estimate import CLUSTER_TOKENS, alone, joined


def append_tail(
    k: Float[Tensor, "B Hk D"],
    v: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    summaries: Float32[Tensor, "B Hk C F"],
    cluster: int,
) -> None:
    """Take in one token a request, its key rotated; nothing where its position is -1.

    Args:
        summaries: numbers of a row lie side by side, rows anywhere.
        cluster: N.
    """
    run = append_tail_triton if on_gpu(k, v, positions, summaries) else append_tail_torch
    run(k, v, positions, summaries, cluster)


def append_tail_torch(
    k: Float[Tensor, "B Hk D"],
    v: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    summaries: Float32[Tensor, "B Hk C F"],
    cluster: int,
) -> None:
    """The definition."""
    slots, at = torch.arange(len(k), device=k.device), positions.clamp_min(0).long()
    number, before = at // cluster, (at % cluster)[:, None, None]
    newest, begun = alone(k, v), summaries[slots, :, number]
    row = torch.where(before > 0, joined(begun, before, newest, 1), newest)
    summaries[slots, :, number] = row.where((positions >= 0)[:, None, None], begun)


def append_tail_triton(
    k: Float[Tensor, "B Hk D"],
    v: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    summaries: Float32[Tensor, "B Hk C F"],
    cluster: int,
) -> None:
    """The same by the kernel."""
    batch, heads, dim = k.shape
    assert summaries.stride(3) == 1, "numbers of a row lie side by side"
    _append_tail[(heads, batch)](
        *(k.contiguous(), v.contiguous(), positions, summaries, *summaries.stride()[:3]),
        **{"D": dim, "DP": triton.next_power_of_2(dim), "CLUSTER": cluster},
        num_warps=1,
    )


@triton.jit
@no_type_check
def _append_tail(
    k, v, positions, summaries, by_request, by_head, by_cluster,
    D: tl.constexpr, DP: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """The cluster of one KV head of one request."""
    head, b, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DP)
    position = tl.load(positions + b)
    if position < 0:
        return
    there, row = d < D, (b * tl.num_programs(0) + head) * D
    key = tl.load(k + row + d, mask=there, other=0.0).to(tl.float32)
    value = tl.load(v + row + d, mask=there, other=0.0).to(tl.float32)
    summaries += b.to(tl.int64) * by_request + head.to(tl.int64) * by_head
    summaries += (position // CLUSTER).to(tl.int64) * by_cluster
    before = position % CLUSTER
    begun = before > 0
    share = tl.div_rn(1.0, (before + 1).to(tl.float32))
    mean_k = tl.load(summaries + d, mask=there & begun, other=0.0)
    mean_v = tl.load(summaries + D + d, mask=there & begun, other=0.0)
    spread = tl.load(summaries + 2 * D, mask=begun, other=0.0)
    off = key - mean_k
    spread += share * tl.div_rn(tl.sum(off * off, 0), D * 1.0)
    tl.debug_barrier()  # several lanes may read what one of them changes
    tl.store(summaries + d, mean_k + share * off, mask=there)
    tl.store(summaries + D + d, mean_v + share * (value - mean_v), mask=there)
    tl.store(summaries + 2 * D, (1 - share) * spread)


def _build(dtype: str, dim: int) -> Build:
    signature = {"k": dtype, "v": dtype, "positions": "*i32", "summaries": "*fp32"}
    signature |= dict.fromkeys(("by_request", "by_head", "by_cluster"), "i32")
    constants = {"D": dim, "DP": triton.next_power_of_2(dim), "CLUSTER": CLUSTER_TOKENS}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"append_tail, {dtype}, D={dim}"
    return Build(name, _append_tail, signature, constants, num_warps=1)


AOT: list[Build] = [_build("*bf16", 128), _build("*fp16", 80), _build("*fp32", 256)]
