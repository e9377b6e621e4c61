"""Low-rank keys of a batch, rebuilt at their positions in the hot buffers (ShadowKV, 2024).

    key  = coefficients[token] . basis[head] + mean[head]       `retrieval.lowrank.LowRankKeys`
    a, b = a cos t - b sin t, b cos t + a sin t                  of every pair (a, b) of rotary dims

The angle t of a token's position comes from two small tables, R(512 m + n) = R(512 m) R(n); the
model's attention scaling is in the near one (`engine.model.rope.FarTable`). Everything is fp32, and
a key is rounded once, to the type of its row.

    coefficients [B, T, R], shared by all heads    basis [B, Hk, R, D]    mean [B, Hk, D]
    near, far: cos and sin [rows, half]            hot [B, Hk, S, row]: K from k_at of a row

Pairs lie `half` apart or, interleaved, side by side: both members are columns of matrix products of
their own, so that a thread that has one has the other. Dims behind 2 half are not rotated.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from engine.kernels.attend_slots import POINTERS, numbers
from engine.model.rope import FarTable, RopeTable
from kvstore.rows import Raw, RowLayout
from native.gpu import Build, on_gpu

# 64 tokens for a basis of 80 KiB (R = 160, D = 128), which programs of a head read from L2: of
# 2,048 tokens and 8 heads 256 programs, about two a multiprocessor; so many registers they leave.
TOKENS, RANKS, WARPS = 64, 32, 8


class Factors(NamedTuple):
    """What keys of one layer are rebuilt from."""

    coefficients: Float[Tensor, "B T R"]
    basis: Float32[Tensor, "B Hk R D"]
    mean: Float32[Tensor, "B Hk D"]


class Angles(NamedTuple):
    """Where keys are rotated to: the tables of a `FarTable`, and which dims are a pair."""

    near: RopeTable  # cos, sin [512, half], times the model's scaling
    far: RopeTable  # of positions 0, 512, 1024...
    interleaved: bool = False


def rebuild(
    factors: Factors,
    tokens: Int32[Tensor, "B Hk K"],
    slots: Int32[Tensor, "B Hk K"],
    angles: Angles,
    hot: UInt8[Tensor, "B Hk S row"],
    layout: RowLayout,
) -> None:
    """Write the keys of missing tokens, each head its own, into the K part of their slots.

    Args:
        tokens: their positions too; -1 for none. Cheapest if these are behind the others.
        slots: of the tokens, none twice.
        hot: mutated.
    """
    if on_gpu(*factors, tokens, slots, hot):
        rebuild_triton(factors, tokens, slots, angles, hot, layout)
    else:
        rebuild_torch(factors, tokens, slots, angles, hot, layout)


def rebuild_torch(
    factors: Factors,
    tokens: Int32[Tensor, "B Hk K"],
    slots: Int32[Tensor, "B Hk K"],
    angles: Angles,
    hot: UInt8[Tensor, "B Hk S row"],
    layout: RowLayout,
) -> None:
    """The definition. Where there is no token, the first that is there is written once more."""
    there = tokens >= 0
    some = there.any(-1)[..., None, None]
    pick = torch.arange(tokens.shape[2], device=tokens.device)
    pick = torch.where(there, pick, there.int().argmax(-1, keepdim=True))
    tokens, slots = (x.gather(2, pick).clamp_min(0).long() for x in (tokens, slots))
    request = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    wide = factors.coefficients[request, tokens].float()
    keys = _rotated(wide @ factors.basis + factors.mean[:, :, None], tokens, angles)
    rows, k_at, _ = numbers(hot, layout, layout.dtype)
    rows = rows[..., k_at : k_at + layout.head_dim]
    at = slots[..., None].expand_as(keys)
    rows.scatter_(2, at, torch.where(some, keys.to(layout.dtype), rows.gather(2, at)))


def _rotated(
    keys: Float32[Tensor, "B Hk K D"], tokens: Tensor, angles: Angles
) -> Float32[Tensor, "B Hk K D"]:
    """Keys at their positions."""
    near, far, interleaved = angles
    half = near.cos.shape[1]
    n_cos, n_sin = (x[tokens % FarTable.STEP] for x in near)
    f_cos, f_sin = (x[tokens // FarTable.STEP] for x in far)
    cos, sin = f_cos * n_cos - f_sin * n_sin, f_sin * n_cos + f_cos * n_sin
    turned, rest = keys[..., : 2 * half], keys[..., 2 * half :]
    shape, dim = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = turned.unflatten(-1, shape).unbind(dim)
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim)
    return torch.cat([pairs.flatten(-2), rest], -1)


def rebuild_triton(
    factors: Factors,
    tokens: Int32[Tensor, "B Hk K"],
    slots: Int32[Tensor, "B Hk K"],
    angles: Angles,
    hot: UInt8[Tensor, "B Hk S row"],
    layout: RowLayout,
) -> None:
    """The same by a kernel."""
    rows, k_at, _ = numbers(hot, layout, layout.dtype)
    (batch, heads, count), coefficients = tokens.shape, factors.coefficients
    _rebuild[(triton.cdiv(count, TOKENS), batch * heads)](
        *(coefficients.contiguous(), factors.basis.contiguous(), factors.mean.contiguous()),
        *(tokens.contiguous(), slots.contiguous()),
        *(x.contiguous() for table in angles[:2] for x in table),
        *(rows, heads, coefficients.shape[1], count, rows.shape[2]),
        **_constants(coefficients.dtype, layout, factors.basis.shape[2], angles),
        **{"K_AT": k_at, "ROW": rows.shape[3]},
        num_warps=WARPS,
    )


def _constants(dtype: torch.dtype, layout: RowLayout, rank: int, angles: Angles) -> dict[str, Any]:
    half, dim = angles.near.cos.shape[1], layout.head_dim
    rest = dim - 2 * half
    return {
        "R": rank,
        "D": dim,
        "HALF": half,
        "HP": max(16, triton.next_power_of_2(half)),
        "RP": max(16, triton.next_power_of_2(rest)) if rest else None,
        "INTERLEAVED": angles.interleaved,
        "STEP": FarTable.STEP,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32x3",
        "TOKENS": TOKENS,
        "RANKS": RANKS,
    }


@triton.jit
@no_type_check
def _columns(
    coefficients, basis, mean, there, column, inside,
    R: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Some columns of the unrotated keys of tokens whose coefficients are at these places."""
    acc = tl.zeros([TOKENS, WIDTH], tl.float32)
    for at in range(0, R, RANKS):
        r = at + tl.arange(0, RANKS)
        known = there[:, None] & (r < R)[None, :]
        left = tl.load(coefficients[:, None] + r[None, :], mask=known, other=0.0).to(tl.float32)
        place = basis + r[:, None] * D + column[None, :]
        right = tl.load(place, mask=(r < R)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc + tl.load(mean + column, mask=inside, other=0.0)[None, :]


@triton.jit
@no_type_check
def _table(cos, sin, place, mask):
    return tl.load(cos + place, mask=mask, other=0.0), tl.load(sin + place, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _store(row, there, column, inside, keys):
    mask = there[:, None] & inside[None, :]
    tl.store(row[:, None] + column[None, :], keys.to(row.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _rebuild(
    coefficients, basis, mean, tokens, slots, near_cos, near_sin, far_cos, far_sin, hot,
    heads, T, K, S,
    R: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr,
    INTERLEAVED: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, K_AT: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """A run of the missing tokens of one KV head of one request."""
    j, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    token = tl.load(tokens + head.to(tl.int64) * K + j, mask=j < K, other=-1)
    if tl.max(token, 0) < 0:
        return
    there = token >= 0
    slot = tl.load(slots + head.to(tl.int64) * K + j, mask=there, other=0)
    own = coefficients + ((head // heads).to(tl.int64) * T + token) * R
    basis += head.to(tl.int64) * R * D
    mean += head * D
    row = hot + (head.to(tl.int64) * S + slot) * ROW + K_AT
    i = tl.arange(0, HP)
    inside = i < HALF
    first = 2 * i if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else i + HALF
    a = _columns(own, basis, mean, there, first, inside, R, D, HP, PRECISION, TOKENS, RANKS)
    b = _columns(own, basis, mean, there, second, inside, R, D, HP, PRECISION, TOKENS, RANKS)
    mask = there[:, None] & inside[None, :]
    n_cos, n_sin = _table(near_cos, near_sin, (token % STEP)[:, None] * HALF + i, mask)
    f_cos, f_sin = _table(far_cos, far_sin, (token // STEP)[:, None] * HALF + i, mask)
    cos, sin = f_cos * n_cos - f_sin * n_sin, f_sin * n_cos + f_cos * n_sin
    a, b = a * cos - b * sin, b * cos + a * sin
    if INTERLEAVED:
        pair = tl.arange(0, 2 * HP)
        _store(row, there, pair, pair < 2 * HALF, tl.interleave(a, b))
    else:
        _store(row, there, first, inside, a)
        _store(row, there, second, inside, b)
    if RP is not None:
        column = 2 * HALF + tl.arange(0, RP)
        inside = column < D
        rest = _columns(own, basis, mean, there, column, inside, R, D, RP, PRECISION, TOKENS, RANKS)
        _store(row, there, column, inside, rest)


def _build(
    dtype: torch.dtype, rank: int, dim: int, half: int, *, interleaved: bool = False
) -> Build:
    layout = RowLayout(Raw(dtype), Raw(dtype), dim, dtype)
    table = RopeTable(torch.empty(0, half), torch.empty(0, half))
    constants = _constants(dtype, layout, rank, Angles(table, table, interleaved))
    constants |= {"K_AT": layout.k_at, "ROW": layout.row_bytes // dtype.itemsize}
    floats = ("basis", "mean", "near_cos", "near_sin", "far_cos", "far_sin")
    signature = {"coefficients": POINTERS[dtype], "hot": POINTERS[dtype]}
    signature |= dict.fromkeys(floats, "*fp32") | {"tokens": "*i32", "slots": "*i32"}
    signature |= dict.fromkeys(("heads", "T", "K", "S"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"rebuild, {dtype}, R={rank}, D={dim}, half {half}, interleaved {interleaved}"
    return Build(name, _rebuild, signature, constants, WARPS)


AOT: list[Build] = [
    _build(torch.bfloat16, 160, 128, 64),
    _build(torch.bfloat16, 160, 128, 32, interleaved=True),
    _build(torch.float16, 100, 80, 40),
    _build(torch.float32, 160, 128, 64),
]
