"""What decides between tokens: one integer for each, ordered as their groups' log-probabilities.

    lse[b, q] = log of the sum over parts of total * exp(top)            once for each query head
    log p[b, q, u] = scale * raw[b, q, u] - lse[b, q]
    g[b, h, u] = max, or log of the sum of exp, over the G query heads q of KV head h
    key[b, h, t] = the bits of g[b, h, t // unit] as an int32, ordered as floats are

A token that must be taken (a sink, in the window, an outlier) has the largest int32, one that does
not exist the smallest; no float's key is either. As in `retrieval.select`, what is not a number
comes below every number, -inf counts as the lowest finite number, and -0.0 as 0.0.

    raw [B, Hk * G, U]  is read once, up to each length     out [B, Hk, U * unit]  is written once

4 G bytes are read of a unit and 4 * unit written, with little between. A program has 1,024 tokens
of a KV head, 8 to each thread: two reads of 16 bytes for each query head, all asked for before the
first is used. At 128k tokens and 8 KV heads there are 1,024 programs, 7 for each of 132
processors. Reads end at the length rounded up to 16 bytes (a mask that cuts them makes four of
each); what they find behind it is dropped.
"""

from typing import Literal, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor

from native.gpu import Build, on_gpu
from retrieval.kernels.scores import Scores, lse

TOKENS = 1024  # of a program
PARTS = 1024  # read at once
WORDS = tl.constexpr(4)  # in the 16 bytes that a thread reads at once
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
SIGN = tl.constexpr(2**31 - 1)  # flips all bits but the sign
SMALLEST = tl.constexpr(torch.finfo(torch.float32).min)

Reduce = Literal["max", "sum"]


def keys(
    scores: Scores,
    lengths: Int32[Tensor, " B"],
    *,
    num_kv_heads: int,
    scale: float,
    sinks: int,
    window: int,
    reduce: Reduce,
    unit: int,
    outliers: Int32[Tensor, "B Hk S"] | None = None,
) -> Int32[Tensor, "B Hk T"]:
    """The key of every token; the lowest int32 for those at and behind `lengths[b]`.

    Args:
        scale: factor on scores before their softmax, the one that `scores` was made with.
        sinks: leading tokens that must be taken.
        window: trailing tokens that must be taken.
        unit: tokens that share a score; T = U * unit.
        outliers: tokens that must be taken; -1 for none.
    """
    take = keys_triton if on_gpu(scores.raw, lengths, outliers) else keys_torch
    return take(
        scores,
        lengths,
        num_kv_heads=num_kv_heads,
        scale=scale,
        sinks=sinks,
        window=window,
        reduce=reduce,
        unit=unit,
        outliers=outliers,
    )


def keys_torch(
    scores: Scores,
    lengths: Int32[Tensor, " B"],
    *,
    num_kv_heads: int,
    scale: float,
    sinks: int,
    window: int,
    reduce: Reduce,
    unit: int,
    outliers: Int32[Tensor, "B Hk S"] | None = None,
) -> Int32[Tensor, "B Hk T"]:
    """The definition."""
    logs = (scores.raw * scale - lse(scores)[..., None]).unflatten(1, (num_kv_heads, -1))
    grouped = logs.amax(2) if reduce == "max" else logs.logsumexp(2)
    clean = grouped.nan_to_num(nan=-torch.inf, neginf=SMALLEST.value) + 0.0  # no -0
    bits = clean.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ SIGN.value, bits).repeat_interleave(unit, 2)
    token = torch.arange(ordered.shape[2], device=ordered.device)
    length = lengths[:, None, None]
    found = ordered.masked_fill((token < sinks) | (token >= length - window), HIGHEST.value)
    if outliers is not None:
        forced = torch.where(outliers < 0, LOWEST.value, HIGHEST.value).int()
        found.scatter_reduce_(2, outliers.clamp_min(0).long(), forced, "amax")
    return found.masked_fill(token >= length, LOWEST.value)


def keys_triton(
    scores: Scores,
    lengths: Int32[Tensor, " B"],
    *,
    num_kv_heads: int,
    scale: float,
    sinks: int,
    window: int,
    reduce: Reduce,
    unit: int,
    outliers: Int32[Tensor, "B Hk S"] | None = None,
) -> Int32[Tensor, "B Hk T"]:
    """Two launches, and a third where there are outliers."""
    raw = scores.raw
    batch, heads, units = raw.shape
    assert raw.stride(2) == 1, "units of a head lie side by side"
    out = torch.empty(batch, num_kv_heads, units * unit, dtype=torch.int32, device=raw.device)
    width = triton.next_power_of_2(unit)
    tile = max(1, TOKENS // width)
    grid = triton.cdiv(units, tile), batch * num_kv_heads
    keys_kernel[grid](
        *(raw, _normalisers(scores, lengths), lengths, out, units, *raw.stride()[:2]),
        *(float(scale), sinks, window, num_kv_heads),
        GROUP=heads // num_kv_heads,
        UNIT=unit,
        WIDTH=width,
        TILE=tile,
        SUM=reduce == "sum",
    )
    if outliers is not None and (count := outliers.shape[2]):
        block = triton.next_power_of_2(count)
        force_kernel[batch * num_kv_heads,](
            *(outliers.contiguous(), lengths, out, count, units * unit, num_kv_heads), BLOCK=block
        )
    return out


def _normalisers(scores: Scores, lengths: Int32[Tensor, " B"]) -> Tensor:
    """`lse` of the scores; of a slot of length 0 whatever was there."""
    top, total = scores.top.contiguous(), scores.total.contiguous()
    batch, heads, parts = top.shape
    out = torch.empty(batch, heads, dtype=torch.float32, device=top.device)
    lse_kernel[batch * heads,](top, total, lengths, out, parts, heads, BLOCK=PARTS)
    return out


@triton.jit
@no_type_check
def lse_kernel(top, total, lengths, out, parts, heads, BLOCK: tl.constexpr):
    """lse of a query head. What is not a number shows in `total`: maxima may pass it over."""
    row = tl.program_id(0)
    if tl.load(lengths + row // heads) == 0:
        return
    run = tl.arange(0, BLOCK)
    top += row.to(tl.int64) * parts
    total += row.to(tl.int64) * parts
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK):
        i = start + run
        most = tl.maximum(most, tl.load(top + i, i < parts, other=float("-inf")))
    peak = tl.max(most, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        i = start + run
        below = tl.load(top + i, i < parts, other=float("-inf")) - peak
        sums += tl.load(total + i, i < parts, other=0.0) * tl.exp(below)
    whole = tl.sum(sums, 0)
    found = tl.where(whole == 0, float("-inf"), tl.log(tl.where(whole == 0, 1.0, whole)))
    tl.store(out + row, peak + found)


@triton.jit
@no_type_check
def keys_kernel(
    raw, lse, lengths, out, units, slot_stride, head_stride, scale, sinks, window, heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Keys of TILE units of a KV head; WIDTH is UNIT rounded up to a power of two."""
    row = tl.program_id(1)
    slot, first = row // heads, (row % heads * GROUP).to(tl.int64)
    length = tl.load(lengths + slot)
    unit = tl.program_id(0) * TILE + tl.arange(0, TILE)
    within = tl.arange(0, WIDTH)
    token = unit[:, None] * UNIT + within[None, :]
    mine = (unit < units)[:, None] & (within < UNIT)[None, :]
    out += row.to(tl.int64) * units * UNIT
    if tl.program_id(0) * TILE * UNIT >= length:
        tl.store(out + token, tl.full([TILE, WIDTH], LOWEST, tl.int32), mine)
        return
    raw += slot.to(tl.int64) * slot_stride + unit
    lse += row.to(tl.int64) * GROUP
    begun = tl.cdiv(tl.cdiv(length, UNIT), WORDS) * WORDS  # else threads read single words
    read = (unit < begun) & (unit < units)
    most = _log(raw + first * head_stride, lse, read, scale)
    for g in tl.static_range(1, GROUP):
        more = _log(raw + (first + g) * head_stride, lse + g, read, scale)
        most = tl.maximum(most, more, propagate_nan=tl.PropagateNan.ALL)
    if SUM:
        most = tl.where(most == float("-inf"), SMALLEST, most)
        sums = tl.zeros([TILE], tl.float32)
        for g in tl.static_range(GROUP):  # the same reads: the compiler keeps the values
            more = _log(raw + (first + g) * head_stride, lse + g, read, scale)
            sums += tl.exp(more - most)
        most += tl.log(tl.where(sums == 0, 1.0, sums))
    key = _ordered(most)[:, None]
    forced = (token < sinks) | (token >= length - window)
    key = tl.where(token < length, tl.where(forced, HIGHEST, key), LOWEST)
    tl.store(out + token, key, mine)


@triton.jit
@no_type_check
def _log(raw, lse, read, scale):
    """Log-probabilities of units, in one query head."""
    return tl.load(raw, read, other=0.0) * scale - tl.load(lse)


@triton.jit
@no_type_check
def _ordered(value):
    """Floats as integers in the same order."""
    low = tl.maximum(value, SMALLEST)
    clean = tl.where(value != value, float("-inf"), tl.where(low == 0, 0.0, low))
    bits = clean.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ SIGN, bits)


@triton.jit
@no_type_check
def force_kernel(outliers, lengths, out, count, capacity, heads, BLOCK: tl.constexpr):
    """The highest key for the outliers of a KV head."""
    row = tl.program_id(0)
    run = tl.arange(0, BLOCK)
    token = tl.load(outliers + row.to(tl.int64) * count + run, run < count, other=-1)
    there = (token >= 0) & (token < tl.load(lengths + row // heads))
    out += row.to(tl.int64) * capacity
    tl.store(out + token, tl.full([BLOCK], HIGHEST, tl.int32), there)


def _build(group: int, unit: int, reduce: Reduce) -> Build:
    """The shapes that head layouts and indexes have."""
    numbers = ("units", "slot_stride", "head_stride", "sinks", "window", "heads")
    constants = {"GROUP": group, "UNIT": unit, "WIDTH": unit, "TILE": TOKENS // unit}
    constants["SUM"] = reduce == "sum"
    return Build(
        name=f"keys, {reduce} of {group}, {unit} tokens a unit",
        kernel=keys_kernel,
        signature={"raw": "*fp32", "lse": "*fp32", "lengths": "*i32", "out": "*i32"}
        | dict.fromkeys(numbers, "i32")
        | {"scale": "fp32"}
        | dict.fromkeys(constants, "constexpr"),
        constants=constants,
    )


AOT = [
    _build(4, 1, "max"),
    _build(8, 1, "sum"),
    _build(4, 8, "max"),
    _build(1, 16, "sum"),
    Build(
        name="lse",
        kernel=lse_kernel,
        signature=dict.fromkeys(("top", "total", "out"), "*fp32")
        | {"lengths": "*i32", "parts": "i32", "heads": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": PARTS},
    ),
    Build(
        name="force, 512 outliers",
        kernel=force_kernel,
        signature=dict.fromkeys(("outliers", "lengths", "out"), "*i32")
        | dict.fromkeys(("count", "capacity", "heads"), "i32")
        | {"BLOCK": "constexpr"},
        constants={"BLOCK": 512},
    ),
]
