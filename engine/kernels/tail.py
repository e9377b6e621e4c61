"""An estimate of attention to what is not selected, of a batch: `retrieval.estimate.Tail`.

Cluster c is tokens [c n, (c + 1) n) of a context. Its summary is the mean key, the mean value and
the variance of its keys; count[c] of its tokens exist, left[c] are not selected.

    key[c]   = (count mean_k - sum of the selected keys) / left      value[c] likewise
    logit[c] = cap(scale q . key[c] + min(2, scale² |q|² spread[c] / 2)) + log left[c]
    out      = sum over c of softmax(logit)[c] value[c],    lse = log-sum-exp of logit

    summaries [B, Hk, C, 2 D + 1]: mean_k | mean_v | spread    hot [B, Hk, S, row]: K | V

A program takes runs of clusters of one KV head, for all of its G queries. Ids ascend, so those in a
run stand side by side, and two loads find where. A matrix of zeros and ones, exact in every type,
adds up the rows of each cluster: every summary and every row is read once, in no atomics' order.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from engine.kernels.attend_slots import POINTERS, cap, chosen, numbers, sizes
from engine.kernels.merge_parts import (
    LOG2E,
    Partials,
    cut,
    empty_parts,
    finite,
    merged,
    softmax_step,
    store_part,
)
from kvstore.rows import Raw, RowLayout
from native.gpu import Build, on_gpu
from retrieval.capped import capped
from retrieval.estimate import CLUSTER_TOKENS, MOST_WIDENING

# 16 summaries of 257 numbers are 16 KiB in flight for a program, three of which fit the registers
# of a multiprocessor. Of 128k tokens 2,048 are 32 of such a run's 2,048. In fp32 there is no tensor
# core for it, and what is multiplied needs the registers of more threads.
CLUSTERS, TOKENS = 16, 16
WARPS, WIDE_WARPS = 4, 8
PROBES = 128  # ids looked at to find the place of a token, and again


def estimate_tail(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """Attention over every token of each context that is not selected, estimated.

    Args:
        q: rotated, as all keys are.
        summaries: F = 2 D + 1; of the clusters that have tokens, the last, partial one too. Rows
            may lie further apart (by a multiple of 4, for wide loads).
        ids: the selected tokens, ascending, none twice, then -1.
        slots: of their rows; a token with a slot of -1 is not selected.
        scale: factor on q . k.
        softcap: None for none.
    """
    run = estimate_tail_torch
    if on_gpu(q, summaries, lengths, ids, hot, slots):
        run = estimate_tail_triton
    return run(q, summaries, lengths, ids, hot, slots, layout, cluster, scale, softcap)


def estimate_tail_torch(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """The definition."""
    starts = torch.arange(summaries.shape[2], device=q.device) * cluster
    count = (lengths[:, None] - starts).clamp(0, cluster).float()[:, None]  # [B, 1, C]
    rows = summaries.masked_fill((count == 0)[..., None], 0)
    keys, values = (rows[..., :-1] * count[..., None]).chunk(2, -1)
    taken = (ids >= 0) & (slots >= 0)
    at = torch.where(taken, ids // cluster, 0).long()
    picked = chosen(hot, torch.where(taken, slots, -1), layout, q.dtype)
    wide = at[..., None].expand_as(picked[0])
    keys, values = (x.scatter_add(2, wide, -p) for x, p in zip((keys, values), picked, strict=True))
    left = count.expand(rows.shape[:3]).scatter_add(2, at, -taken.float())[:, :, None]
    folded = q.unflatten(1, (ids.shape[1], -1)).float()
    wider = scale * scale / 2 * folded.square().sum(-1, keepdim=True) * rows[:, :, None, :, -1]
    logits = folded @ keys.mT * scale / left.clamp_min(1) + wider.clamp_max(MOST_WIDENING)
    logits = capped(logits, softcap) + left.log()
    lse = logits.logsumexp(-1)
    shares = (logits - finite(lse)[..., None]).exp() / left.clamp_min(1)
    return Partials((shares @ values).flatten(1, 2).to(q.dtype), lse.flatten(1))


def estimate_tail_triton(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """The same by a kernel, and by another that merges parts."""
    made = empty_parts(q, parts_of(summaries)[0])
    estimate_parts(q, summaries, lengths, ids, hot, slots, layout, cluster, scale, softcap, made)
    return merged(made, q.dtype)


def parts_of(summaries: Float32[Tensor, "B Hk C F"]) -> tuple[int, int]:
    """Into how many parts the clusters are cut, and how many a part has."""
    batch, heads, clusters = summaries.shape[:3]
    return cut(clusters, batch * heads, CLUSTERS)


def estimate_parts(
    q: Float[Tensor, "B Hq D"],
    summaries: Float32[Tensor, "B Hk C F"],
    lengths: Int32[Tensor, " B"],
    ids: Int32[Tensor, "B Hk K"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    cluster: int,
    scale: float,
    softcap: float | None,
    made: Partials,
) -> None:
    """The estimate of each part by itself, written to `made` [parts, B, Hq, ...]."""
    rows, k_at, v_at = numbers(hot, layout, q.dtype)
    (batch, heads, clusters), count = summaries.shape[:3], ids.shape[2]
    parts, part = parts_of(summaries)
    summaries = summaries if summaries.stride(3) == 1 else summaries.contiguous()
    _estimate[(parts, batch * heads)](
        *(q.contiguous(), summaries, lengths, ids.contiguous(), rows, slots.contiguous()),
        *(made.out, made.lse, heads, clusters, count, rows.shape[2], part, scale),
        *summaries.stride()[:3],
        **_constants(q.shape[1] // heads, layout.head_dim, q.dtype, cluster, count),
        **{"K_AT": k_at, "V_AT": v_at, "ROW": rows.shape[3], "SOFTCAP": softcap},
        num_warps=_warps(q.dtype),
    )


def _warps(dtype: torch.dtype) -> int:
    return WIDE_WARPS if dtype == torch.float32 else WARPS


def _constants(
    group: int, dim: int, dtype: torch.dtype, cluster: int, count: int
) -> dict[str, Any]:
    step = triton.next_power_of_2(-(-count // PROBES))
    places = {"CLUSTER": cluster, "CLUSTERS": CLUSTERS, "TOKENS": TOKENS, "WIDEST": MOST_WIDENING}
    return sizes(group, dim, dtype) | places | {"PROBES": PROBES, "STEP": step}


@triton.jit
@no_type_check
def _below(ids, K, token, PROBES: tl.constexpr, STEP: tl.constexpr):
    """How many of K ascending ids, -1 behind them, are below a token."""
    probe = tl.arange(0, PROBES) * STEP
    found = tl.load(ids + probe, mask=probe < K, other=-1)
    runs = tl.sum(((found >= 0) & (found < token)).to(tl.int32), 0)  # that begin below it
    first = tl.maximum(runs - 1, 0) * STEP
    near = first + tl.arange(0, STEP)
    found = tl.load(ids + near, mask=near < K, other=-1)
    return first + tl.sum(((found >= 0) & (found < token)).to(tl.int32), 0)


@triton.jit
@no_type_check
def _products(query, keys, PRECISION: tl.constexpr):
    """query . key in fp32. 16-bit queries have all their digits in tf32; keys have them in two."""
    if PRECISION == "ieee":
        return tl.dot(query, tl.trans(keys), input_precision="ieee")
    high = (keys.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 of 23 bits
    low = tl.dot(query, tl.trans(keys - high), input_precision="tf32")
    return tl.dot(query, tl.trans(high), low, input_precision="tf32")


@triton.jit
@no_type_check
def _sums(summary, count, D: tl.constexpr, DP: tl.constexpr):
    """Sums of keys and of values, and the variance, of clusters whose summaries are there."""
    d = tl.arange(0, DP)
    there, place = (count > 0)[:, None] & (d < D)[None, :], summary[:, None] + d[None, :]
    keys = tl.load(place, mask=there, other=0.0) * count[:, None]
    values = tl.load(place + D, mask=there, other=0.0) * count[:, None]
    return keys, values, tl.load(summary + 2 * D, mask=count > 0, other=0.0)


@triton.jit
@no_type_check
def _without_selected(
    keys, values, left, ids, slots, rows, K, start, first,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, K_AT: tl.constexpr,
    V_AT: tl.constexpr, ROW: tl.constexpr, CLUSTER: tl.constexpr, CLUSTERS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums and counts of clusters from `start` on, less the selected, and the first id behind."""
    d, j, c = tl.arange(0, DP), tl.arange(0, TOKENS), tl.arange(0, CLUSTERS)
    seen = TOKENS
    while seen == TOKENS:
        token = tl.load(ids + first + j, mask=first + j < K, other=-1)
        slot = tl.load(slots + first + j, mask=first + j < K, other=-1)
        inside = (token >= 0) & (token < (start + CLUSTERS) * CLUSTER)
        slot = tl.where(inside, slot, -1)
        row = rows + slot.to(tl.int64)[:, None] * ROW + d[None, :]
        there = (slot >= 0)[:, None] & (d < D)[None, :]
        k = tl.load(row + K_AT, mask=there, other=0.0)
        v = tl.load(row + V_AT, mask=there, other=0.0)
        own = (c[:, None] == (token // CLUSTER - start)[None, :]) & (slot >= 0)[None, :]
        left -= tl.sum(own.to(tl.float32), 1)
        keys -= tl.dot(own.to(k.dtype), k, input_precision=PRECISION)
        values -= tl.dot(own.to(v.dtype), v, input_precision=PRECISION)
        seen = tl.sum(inside.to(tl.int32), 0)
        first += seen
    return keys, values, left, first


@triton.jit
@no_type_check
def _estimate(
    q, summaries, lengths, ids, hot, slots, out, lse, heads, C, K, S, part, scale,
    by_request, by_head, by_cluster,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, K_AT: tl.constexpr, V_AT: tl.constexpr, ROW: tl.constexpr,
    CLUSTER: tl.constexpr, CLUSTERS: tl.constexpr, TOKENS: tl.constexpr, WIDEST: tl.constexpr,
    PROBES: tl.constexpr, STEP: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One part of the clusters of one KV head of one request."""
    n, head = tl.program_id(0), tl.program_id(1)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    length = tl.load(lengths + head // heads)
    query = q + (head * G + g)[:, None] * D + d[None, :]
    query = tl.load(query, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    widening = tl.sum(query * query, 1) * (scale * scale / 2)
    summaries += (head // heads).to(tl.int64) * by_request + (head % heads).to(tl.int64) * by_head
    rows = hot + head.to(tl.int64) * S * ROW
    top, total = tl.full([GP], float("-inf"), tl.float32), tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    stop = tl.minimum(tl.minimum((n + 1) * part, C), tl.cdiv(length, CLUSTER))
    ids, slots = ids + head.to(tl.int64) * K, slots + head.to(tl.int64) * K
    first = _below(ids, K, n * part * CLUSTER, PROBES, STEP)
    for start in range(n * part, stop, CLUSTERS):
        at = start + tl.arange(0, CLUSTERS)
        count = tl.minimum(length - at * CLUSTER, CLUSTER)
        count = tl.where(at < stop, count, 0).to(tl.float32)
        keys, values, spread = _sums(summaries + at.to(tl.int64) * by_cluster, count, D, DP)
        keys, values, left, first = _without_selected(
            keys, values, count, ids, slots, rows, K, start, first,
            D, DP, PRECISION, K_AT, V_AT, ROW, CLUSTER, CLUSTERS, TOKENS,
        )  # fmt: skip
        divisor = tl.maximum(left, 1.0)
        logits = _products(query, keys, PRECISION) * scale / divisor[None, :]
        logits += tl.minimum(widening[:, None] * spread[None, :], WIDEST)
        logits = tl.where((left > 0)[None, :], cap(logits, SOFTCAP), float("-inf"))
        logits = logits * LOG2E + tl.log2(divisor)[None, :]
        weights, shrink, top, total = softmax_step(logits, top, total)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights / divisor[None, :], values, input_precision=PRECISION)
    store_part(out, lse, (n * tl.num_programs(1) + head) * G, acc, top, total, G, D, GP, DP)


def _build(dtype: torch.dtype, group: int, dim: int, softcap: float | None = None) -> Build:
    size, pointer = dtype.itemsize, POINTERS[dtype]
    layout = RowLayout(Raw(dtype), Raw(dtype), dim, dtype)
    constants = _constants(group, dim, dtype, CLUSTER_TOKENS, 2048) | {"SOFTCAP": softcap}
    constants |= {"K_AT": layout.k_at // size, "V_AT": layout.v_at // size}
    constants |= {"ROW": layout.row_bytes // size}
    signature = {"q": pointer, "summaries": "*fp32", "lengths": "*i32", "ids": "*i32"}
    signature |= {"hot": pointer, "slots": "*i32", "out": "*fp32", "lse": "*fp32", "scale": "fp32"}
    signature |= dict.fromkeys(("heads", "C", "K", "S", "part"), "i32")
    signature |= dict.fromkeys(("by_request", "by_head", "by_cluster"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"estimate_tail, {dtype}, G={group}, D={dim}, softcap {softcap}"
    spills = "three numbers, of 256 dimensions, on sm_80" if dim > 128 else None
    return Build(name, _estimate, signature, constants, _warps(dtype), spills=spills)


AOT: list[Build] = [
    _build(torch.bfloat16, 4, 128),
    _build(torch.bfloat16, 2, 256, 50.0),
    _build(torch.float16, 3, 80),
    _build(torch.float32, 4, 128),
]
