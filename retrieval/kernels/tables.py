"""Byte tables of queries for 4-bit codes, on a batch whose requests divide their bits differently.

    along[e]    = (q · basis[:, e]) * spread[e]                              one number a coordinate
    entry[m, c] = sum over j < 4 / bits[m] of
                      along[first[m] + j] * levels[bits[m], c >> j * bits[m] & (1 << bits[m]) - 1]
    byte[m, c]  = round((entry[m, c] - low[m]) / step)      low[m], high[m]: of entry[m, :]
    step        = max over m of (high[m] - low[m]) / 255,   bias = sum over m of low[m]

A request's axes are data here, not shapes: code m stands for 4 / bits[m] coordinates from first[m]
on, so one kernel and one graph serve requests that give 4, 2 and 1 bits to different numbers of
dimensions. The bytes are those of `retrieval.kernels.scan.quantized`.

One program per request and query head: it reads the basis of its KV head (D * D * 4 bytes, 64 KiB
at D = 128; the other query heads find it in L2) in rows of 16 bytes a thread, and keeps along,
entries and extremes in registers.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Int16, Int32, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from native.gpu import Build, on_gpu
from retrieval.kernels.scan import quantized

ROWS = 16  # of the basis in a step; with 32, Blackwell code spills
WARPS = 8


class Tables(NamedTuple):
    """Tables as bytes, laid out so that one lookup serves L query heads of a KV head.

    words: byte of query head w * L + l of the group, in 16 bits so that L sums of up to 257 bytes
        fit one word of 16 * L bits side by side; 0 for heads that a group does not have.
    step, bias: entry = byte * step + a part of the bias.
    offset: added to every score after the token's scale, or None.
    """

    words: Int16[Tensor, "B Hk W M 16 L"]
    step: Float32[Tensor, "B Hq"]
    bias: Float32[Tensor, "B Hq"]
    offset: Float32[Tensor, "B Hq"] | None


class Coordinates(NamedTuple):
    """What keys are rounded in, for every slot; E <= D coordinates are in use.

    basis: columns behind E are 0.
    spread: 1 behind E.
    first, bits: of code m: its first coordinate, and the bits of each of its 4 / bits[m].
    levels: row b has the 2^b levels of b bits, then 0. edges: the numbers halfway, then +inf.
    """

    basis: Float32[Tensor, "B Hk D D"]
    spread: Float32[Tensor, "B Hk D"]
    mean: Float32[Tensor, "B Hk D"]
    first: Int32[Tensor, "B M"]
    bits: Int32[Tensor, "B M"]
    levels: Float32[Tensor, "5 16"]
    edges: Float32[Tensor, "5 16"]


def lanes(group: int) -> tuple[int, int]:
    """W words of L heads each for a group of query heads: L is 2 or 4."""
    width = 2 if group <= 2 else 4
    return -(-group // width), width


def laid_out(
    values: UInt8[Tensor, "B Hq M 16"], num_kv_heads: int
) -> Int16[Tensor, "B Hk W M 16 L"]:
    """Bytes of each query head as words."""
    grouped = values.unflatten(1, (num_kv_heads, -1)).to(torch.int16)
    words, width = lanes(grouped.shape[2])
    full = F.pad(grouped, (0, 0, 0, 0, 0, words * width - grouped.shape[2]))
    return full.unflatten(2, (words, width)).permute(0, 1, 2, 4, 5, 3).contiguous()


def rounded(
    table: Float[Tensor, "B Hq M 16"],
    num_kv_heads: int,
    offset: Float32[Tensor, "B Hq"] | None = None,
) -> Tables:
    """Tables that were made elsewhere, as bytes."""
    values, step, bias = quantized(table.flatten(0, 1))
    values, step, bias = (x.unflatten(0, table.shape[:2]) for x in (values, step, bias))
    return Tables(laid_out(values, num_kv_heads), step, bias, offset)


def tables(query: Float[Tensor, "B Hq D"], axes: Coordinates) -> Tables:
    """The tables of queries, and q · mean as their offset."""
    if on_gpu(query, *axes):
        return tables_triton(query, axes)
    return tables_torch(query, axes)


def tables_torch(query: Float[Tensor, "B Hq D"], axes: Coordinates) -> Tables:
    """The definition."""
    heads, codes = axes.basis.shape[1], torch.arange(16, device=query.device)
    grouped = query.float().unflatten(1, (heads, -1))  # [B, Hk, G, D]
    along = (grouped @ axes.basis * axes.spread[:, :, None]).flatten(1, 2)
    places, shifts, there = coordinates(axes)
    bits = axes.bits[..., None, None]
    digits = (codes >> shifts[..., None]) & ((1 << bits) - 1)  # [B, M, 4, 16]
    levels = axes.levels[bits, digits] * there[..., None]
    picked = along.gather(2, places.flatten(1)[:, None].expand(-1, along.shape[1], -1))
    table = torch.einsum("bhmj,bmjc->bhmc", picked.unflatten(2, places.shape[1:]), levels)
    offset = (grouped @ axes.mean[..., None]).flatten(1)
    return rounded(table, heads, offset)


def coordinates(
    axes: Coordinates,
) -> tuple[Int64[Tensor, "B M 4"], Int32[Tensor, "B M 4"], Bool[Tensor, "B M 4"]]:
    """Of up to 4 coordinates of every code: which, the place of their bits, and if there is one."""
    number = torch.arange(4, dtype=torch.int32, device=axes.bits.device)
    shifts = number * axes.bits[..., None]
    there = (shifts < 4) & (axes.bits[..., None] > 0)
    places = (axes.first[..., None] + number).where(there, 0).long()
    return places, shifts.where(there, 0), there


def tables_triton(query: Float[Tensor, "B Hq D"], axes: Coordinates) -> Tables:
    """The same by the kernel."""
    assert all(x.is_contiguous() for x in axes), "numbers lie side by side"
    batch, heads, dim = axes.mean.shape
    queries, codes = query.shape[1], axes.bits.shape[1]
    words, width = lanes(queries // heads)
    new = query.new_empty
    found = Tables(
        new((batch, heads, words, codes, 16, width), dtype=torch.int16),
        *(new((batch, queries), dtype=torch.float32) for _ in range(3)),
    )
    constants = {"G": queries // heads, "LANES": width, **sizes(dim, codes)}
    _tables[(words * width, heads, batch)](
        query.contiguous(), *axes[:6], *found, **constants, num_warps=WARPS
    )
    return found


def sizes(dim: int, codes: int) -> dict[str, int]:
    """Constants of kernels that work along axes; those padded to powers of 2 are DIM and CODES."""
    padded = {"DIM": triton.next_power_of_2(dim), "CODES": triton.next_power_of_2(codes)}
    return {"D": dim, "M": codes, **padded, "ROWS": ROWS}


@triton.jit
@no_type_check
def _tables(
    query, basis, spread, mean, first, bits, levels, words, step, bias, offset,
    G: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    DIM: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    g, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + h
    m = tl.arange(0, CODES)
    c = tl.arange(0, 16)
    word = head * (tl.num_programs(0) // LANES) + g // LANES
    out = words + ((word * M + m[:, None]) * 16 + c[None, :]) * LANES + g % LANES
    coded = (m < M)[:, None]
    if g >= G:  # a head that only fills a word
        tl.store(out, tl.zeros((CODES, 16), tl.int16), mask=coded)
        return
    at = head * G + g
    query += at * D
    e = tl.arange(0, DIM)
    along = along_axes(query, None, basis + head * D * D, D, DIM, ROWS)
    along *= tl.load(spread + head * D + e, mask=e < D, other=0.0)
    table = _entries(along, first, bits, levels, b * M, M, CODES)
    low, high = tl.min(table, 1), tl.max(table, 1)
    size = tl.max(tl.where(m < M, high - low, 0.0), 0) / 255.0
    unit = tl.where(size < 1.1754943508222875e-38, 1.1754943508222875e-38, size)  # NaN stays
    values = tl.div_rn(table - low[:, None], tl.zeros_like(table) + unit)
    values = tl.where(values == values, tl.minimum(tl.maximum(values, 0.0), 255.0), 0.0)
    values = (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest, ties to even
    tl.store(out, values.to(tl.int16), mask=coded)
    tl.store(step + at, size)
    tl.store(bias + at, tl.sum(tl.where(m < M, low, 0.0), 0))
    q = tl.load(query + e, mask=e < D, other=0.0).to(tl.float32)
    tl.store(offset + at, tl.sum(q * tl.load(mean + head * D + e, mask=e < D, other=0.0), 0))


@triton.jit
@no_type_check
def along_axes(row, mean, basis, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """(row - mean) @ basis of one head, [DIM]; without a mean, row @ basis."""
    e = tl.arange(0, DIM)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, DIM), tl.float32)
    for start in tl.static_range(0, DIM, ROWS):  # unrolled, so that loads run ahead
        d = start + rows
        x = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
        if mean is not None:
            x -= tl.load(mean + d, mask=d < D, other=0.0)
        inside = (d < D)[:, None] & (e < D)[None, :]
        total += x[:, None] * tl.load(basis + d[:, None] * D + e[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _entries(along, first, bits, levels, row, M: tl.constexpr, CODES: tl.constexpr):
    """What each of the 16 values of every code adds to a score: [CODES, 16]."""
    m = tl.arange(0, CODES)
    c = tl.arange(0, 16)[None, :]
    start = tl.load(first + row + m, mask=m < M, other=0)
    width = tl.load(bits + row + m, mask=m < M, other=0)
    table = tl.zeros((CODES, 16), tl.float32)
    for j in tl.static_range(4):
        there = (j * width < 4) & (width > 0)
        value = tl.gather(along, tl.where(there, start + j, 0), 0)
        digit = (c >> (j * width)[:, None]) & ((1 << width) - 1)[:, None]
        level = tl.load(levels + width[:, None] * 16 + digit)
        table += tl.where(there, value, 0.0)[:, None] * level
    return table


def _build(codes: int, dim: int, group: int, dtype: str) -> Build:
    pointers = {
        "query": dtype, **dict.fromkeys(("basis", "spread", "mean"), "*fp32"),
        "first": "*i32", "bits": "*i32", "levels": "*fp32", "words": "*i16",
        **dict.fromkeys(("step", "bias", "offset"), "*fp32"),
    }  # fmt: skip
    constants = {"G": group, "LANES": lanes(group)[1], **sizes(dim, codes)}
    signature = pointers | dict.fromkeys(constants, "constexpr")
    name = f"tables, {codes} codes, D={dim}, G={group}"
    return Build(name, _tables, signature, constants, num_warps=WARPS)


AOT = [
    _build(64, 128, 4, "*bf16"),
    _build(64, 128, 1, "*bf16"),
    _build(128, 128, 8, "*bf16"),
    _build(128, 256, 4, "*bf16"),
    _build(40, 80, 4, "*fp16"),
    _build(16, 64, 3, "*fp32"),
]
