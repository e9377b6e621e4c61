"""Attention of one token per request over chosen rows of the hot buffers, where they lie.

    out[b, h, g] = sum over j of p[j] v[j],    p = softmax over j of cap(scale q[b, h, g] . k[j])
    lse[b, h, g] = log of the sum over j of exp(cap(scale q[b, h, g] . k[j]))

j runs over the slots that KV head h of request b lists; cap(x) = softcap tanh(x / softcap), or x.

    hot [B, Hk, S, row]    row: [ K from k_at | V from v_at | to a multiple of 16 bytes ]

A row is read once, for all G queries of its head, which are padded to the 16 rows that a tensor
core takes. The chosen are cut into parts, each an online softmax (Milakov & Gimelshein 2018), and
parts are merged by their log-sum-exp (flash decoding, Dao et al. 2023).
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from engine.kernels.attend_token import row_place
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

# 64 rows of 512 B are 32 KiB, about what each of 132 multiprocessors must have in flight to keep
# 4.8 TB/s busy at 0.8 us; up to four programs each hide that a program waits between its blocks.
BLOCK = 64
LARGE_ROWS = 1 << 10  # bytes of a key from which on a block has a quarter of them
TRIMMED = 512  # slots of a part from which on it pays to look first where the last of them is
LOOKED_AT = 1024
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Numbers(NamedTuple):
    """Rows of bytes as numbers; places are counted in numbers, too."""

    rows: Float[Tensor, "B Hk S E"]
    k_at: int
    v_at: int


def numbers(hot: UInt8[Tensor, "B Hk S row"], layout: RowLayout, dtype: torch.dtype) -> Numbers:
    """The hot buffers' memory as keys and values. Raises ValueError unless they are of `dtype`."""
    place = row_place(layout)
    if place is None or place.dtype != dtype:
        raise ValueError(f"hot rows must hold raw keys and values in {dtype}, got {layout}")
    size = dtype.itemsize
    return Numbers(hot.view(dtype), place.k_at // size, place.v_at // size)


def attend_slots(
    q: Float[Tensor, "B Hq D"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """Attention of the newest token of each request over the listed rows.

    Args:
        q: rotated.
        hot: contiguous; keys are rotated.
        slots: none twice in a head; -1 for nothing, anywhere.
        scale: factor on q . k.
    """
    if on_gpu(q, hot, slots):
        return attend_slots_triton(q, hot, slots, layout, scale, softcap)
    return attend_slots_torch(q, hot, slots, layout, scale, softcap)


def attend_slots_torch(
    q: Float[Tensor, "B Hq D"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """The definition."""
    k, v = chosen(hot, slots, layout, q.dtype)
    scores = q.unflatten(1, (slots.shape[1], -1)).float() @ k.mT * scale
    scores = capped(scores, softcap).masked_fill((slots < 0)[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - finite(lse)[..., None]).exp()
    return Partials((weights @ v).flatten(1, 2).to(q.dtype), lse.flatten(1))


def chosen(
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    dtype: torch.dtype,
) -> tuple[Float32[Tensor, "B Hk K D"], Float32[Tensor, "B Hk K D"]]:
    """Keys and values of slots; zeros for -1, whatever is in the buffer."""
    (rows, k_at, v_at), dim = numbers(hot, layout, dtype), layout.head_dim
    first = torch.arange(rows.shape[0] * rows.shape[1], device=slots.device) * rows.shape[2]
    at = slots.clamp_min(0) + first.view(*rows.shape[:2], 1)
    found = rows.flatten(0, 2).index_select(0, at.flatten()).view(*slots.shape, -1).float()
    found = found.masked_fill((slots < 0)[..., None], 0)
    return found[..., k_at : k_at + dim], found[..., v_at : v_at + dim]


def attend_slots_triton(
    q: Float[Tensor, "B Hq D"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    scale: float,
    softcap: float | None = None,
) -> Partials:
    """The same by a kernel, and by another where the chosen are cut into parts."""
    made = empty_parts(q, parts_of(slots)[0])
    attend_parts(q, hot, slots, layout, scale, softcap, made)
    return merged(made, q.dtype)


def parts_of(slots: Int32[Tensor, "B Hk K"]) -> tuple[int, int]:
    """Into how many parts the chosen are cut, and how many slots a part has."""
    batch, heads, count = slots.shape
    return cut(count, batch * heads, BLOCK)


def attend_parts(
    q: Float[Tensor, "B Hq D"],
    hot: UInt8[Tensor, "B Hk S row"],
    slots: Int32[Tensor, "B Hk K"],
    layout: RowLayout,
    scale: float,
    softcap: float | None,
    made: Partials,
) -> None:
    """Attention over each part by itself, written to `made` [parts, B, Hq, ...]."""
    (rows, k_at, v_at), (batch, heads, count) = numbers(hot, layout, q.dtype), slots.shape
    block, (parts, part) = rows_at_once(layout.head_dim, q.dtype), parts_of(slots)
    _attend_part[(parts, batch * heads)](
        *(q.contiguous(), rows, slots.contiguous(), made.out, made.lse),
        *(count, rows.shape[2], part, scale),
        **sizes(q.shape[1] // heads, layout.head_dim, q.dtype),
        **{"K_AT": k_at, "V_AT": v_at, "ROW": rows.shape[3], "SOFTCAP": softcap, "BLOCK": block},
        LOOK=LOOKED_AT if part >= TRIMMED else None,
    )


def rows_at_once(dim: int, dtype: torch.dtype) -> int:
    """Rows of a block: of 256 dimensions in fp32, 32 or 64 of them spill KBs of registers."""
    return BLOCK // 4 if triton.next_power_of_2(dim) * dtype.itemsize >= LARGE_ROWS else BLOCK


def sizes(group: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants that the kernels over rows share: at least what a tensor core's tile takes."""
    return {
        "G": group,
        "D": dim,
        "GP": max(16, triton.next_power_of_2(group)),
        "DP": max(16, triton.next_power_of_2(dim)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32x3",  # of dots of fp32 only
    }


@triton.jit
@no_type_check
def cap(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP tanh(scores / SOFTCAP); tanh from an exponential, of less than would overflow."""
    if SOFTCAP is not None:
        exponent = tl.minimum(scores * (2 * LOG2E / SOFTCAP), 100.0)
        scores = SOFTCAP - 2 * SOFTCAP / (tl.exp2(exponent) + 1)
    return scores


@triton.jit
@no_type_check
def _behind_last(slots, start, stop, LOOK: tl.constexpr):
    """Where what is listed in [start, stop) ends: long lists of short contexts cost little."""
    behind = start
    for at in range(start, stop, LOOK):
        j = at + tl.arange(0, LOOK)
        slot = tl.load(slots + j, mask=j < stop, other=-1)
        behind = tl.maximum(behind, tl.max(tl.where(slot >= 0, j + 1, 0), 0))
    return behind


@triton.jit
@no_type_check
def _attend_part(
    q, hot, slots, out, lse, K, S, part, scale,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, K_AT: tl.constexpr, V_AT: tl.constexpr, ROW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one KV head of one request."""
    n, head = tl.program_id(0), tl.program_id(1)
    g, d, j = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, BLOCK)
    here = (g < G)[:, None] & (d < D)[None, :]
    query = tl.load(q + (head * G + g)[:, None] * D + d[None, :], mask=here, other=0.0)
    rows = hot + head.to(tl.int64) * S * ROW
    top, total = tl.full([GP], float("-inf"), tl.float32), tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    slots += head.to(tl.int64) * K
    stop = tl.minimum((n + 1) * part, K)
    if LOOK is not None:
        stop = _behind_last(slots, n * part, stop, LOOK)
    for at in range(n * part, stop, BLOCK):
        slot = tl.load(slots + at + j, mask=at + j < stop, other=-1)
        row = rows + slot.to(tl.int64)[:, None] * ROW + d[None, :]
        there = (slot >= 0)[:, None] & (d < D)[None, :]
        k = tl.load(row + K_AT, mask=there, other=0.0)
        v = tl.load(row + V_AT, mask=there, other=0.0)
        scores = cap(tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale, SOFTCAP)
        scores = tl.where((slot >= 0)[None, :], scores * LOG2E, float("-inf"))
        weights, shrink, top, total = softmax_step(scores, top, total)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    first = (n * tl.num_programs(1) + head) * G
    store_part(out, lse, first, acc, top, total, G, D, GP, DP)


def _attend_build(
    dtype: torch.dtype, group: int, dim: int, softcap: float | None = None, *, trimmed: bool = False
) -> Build:
    """The kernel over rows of K | V in `dtype`."""
    size, pointer = dtype.itemsize, POINTERS[dtype]
    layout = RowLayout(Raw(dtype), Raw(dtype), dim, dtype)
    constants = sizes(group, dim, dtype) | {
        "K_AT": layout.k_at // size,
        "V_AT": layout.v_at // size,
        "ROW": layout.row_bytes // size,
        "SOFTCAP": softcap,
        "BLOCK": rows_at_once(dim, dtype),
        "LOOK": LOOKED_AT if trimmed else None,
    }
    signature = {"q": pointer, "hot": pointer, "slots": "*i32", "out": "*fp32", "lse": "*fp32"}
    signature |= {"K": "i32", "S": "i32", "part": "i32", "scale": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"attend_slots, {dtype}, G={group}, D={dim}, softcap {softcap}, trimmed {trimmed}"
    return Build(name, _attend_part, signature, constants)


AOT: list[Build] = [
    _attend_build(torch.bfloat16, 4, 128),
    _attend_build(torch.bfloat16, 4, 128, trimmed=True),
    _attend_build(torch.bfloat16, 8, 256, 50.0),
    _attend_build(torch.float16, 3, 80),
    _attend_build(torch.float32, 4, 128),
    _attend_build(torch.float32, 4, 256),
]
