"""The 4-bit codes of one new key for each slot of a batch, written in place.

    along = (key - mean) @ basis / spread,      rms = sqrt(mean of along^2 over the E in use)
    digit = number of edges[bits[m]] below along[first[m] + j] / rms
    code[m] = sum over j < 4 / bits[m] of digit << j * bits[m]
    scale   = rms * sum of (u * spread)^2 / sum of u * level * spread^2,     u = along / rms

as `retrieval.scalar.encoded` has it, with a request's axes as data (`Coordinates`). A code is half
of one byte for each of M sub-spaces, 16 bytes apart (`retrieval.codes`): of token t in block
t // 32, byte t % 16, the low half where t % 32 < 16. The other half is kept.

One program per request and KV head, which owns all bytes that it changes; as in `tables`, reading
the basis is most of its work.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Int32, UInt8
from torch import Tensor

from native.gpu import Build, on_gpu
from retrieval.codes import BLOCK
from retrieval.kernels.tables import WARPS, Coordinates, along_axes, coordinates, sizes


def encode(
    keys: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    axes: Coordinates,
    packed: UInt8[Tensor, "B Hk N M 16"],
    scales: Float16[Tensor, "B Hk T"],
) -> None:
    """Write codes and scale of token `positions[b]` into `packed` and `scales`, both contiguous.

    Nothing where a position is negative, or behind the T = N * 32 tokens that there is room for.

    Raises:
        ValueError: if codes or scales are not contiguous.
    """
    if on_gpu(keys, positions, *axes, packed, scales):
        encode_triton(keys, positions, axes, packed, scales)
    else:
        encode_torch(keys, positions, axes, packed, scales)


def encode_torch(
    keys: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    axes: Coordinates,
    packed: UInt8[Tensor, "B Hk N M 16"],
    scales: Float16[Tensor, "B Hk T"],
) -> None:
    """The definition."""
    _check(packed, scales)
    codes, scale = _encoded(keys, axes)
    put(codes, positions, packed)
    slots = torch.arange(len(keys), device=keys.device)
    inside = (positions >= 0) & (positions < scales.shape[2])
    at = positions.where(inside, 0).long()
    scales[slots, :, at] = scale.where(inside[:, None], scales[slots, :, at])


def put(
    codes: UInt8[Tensor, "B Hk M"],
    positions: Int32[Tensor, " B"],
    packed: UInt8[Tensor, "B Hk N M 16"],
) -> None:
    """Write the codes of one token of each slot, in static shapes; see `encode`."""
    slots = torch.arange(len(codes), device=codes.device)
    inside = (positions >= 0) & (positions < packed.shape[2] * BLOCK)
    at = positions.where(inside, 0).long()
    place = (slots, slice(None), at // BLOCK, slice(None), at % (BLOCK // 2))
    old = packed[place]  # [B, Hk, M]
    high = (at % BLOCK >= BLOCK // 2)[:, None, None]
    new = torch.where(high, old & 15 | codes << 4, old & 240 | codes)
    packed[place] = new.where(inside[:, None, None], old)


def _encoded(
    keys: Float[Tensor, "B Hk D"], axes: Coordinates
) -> tuple[UInt8[Tensor, "B Hk M"], Float16[Tensor, "B Hk"]]:
    centred = (keys.float() - axes.mean)[:, :, None]
    along = (centred @ axes.basis)[:, :, 0] / axes.spread
    places, shifts, there = coordinates(axes)  # [B, M, 4]
    rms = (along.square().sum(-1) / there.sum((1, 2))[:, None]).sqrt()
    unit = along / rms.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    index = places.flatten(1)[:, None].expand(-1, keys.shape[1], -1)
    u, spread = (x.gather(2, index).unflatten(2, places.shape[1:]) for x in (unit, axes.spread))
    edges = axes.edges[axes.bits][:, None, :, None]  # [B, 1, M, 1, 16]
    digits = ((edges < u[..., None]) | u[..., None].isnan()).sum(-1)
    digits = digits.minimum((1 << axes.bits[:, None, :, None]) - 1)
    level = axes.levels[axes.bits[:, None, :, None], digits]
    product = (u * level * spread.square() * there[:, None]).sum((2, 3))
    factor = (u.square() * spread.square() * there[:, None]).sum((2, 3)) / product
    scale = (rms * factor).nan_to_num(0).clamp(max=torch.finfo(torch.float16).max)
    codes = ((digits << shifts[:, None]) * there[:, None]).sum(-1)
    return codes.to(torch.uint8), scale.half()


def encode_triton(
    keys: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    axes: Coordinates,
    packed: UInt8[Tensor, "B Hk N M 16"],
    scales: Float16[Tensor, "B Hk T"],
) -> None:
    """The same by the kernel."""
    assert all(x.is_contiguous() for x in axes), "numbers lie side by side"
    _check(packed, scales)
    batch, heads, dim = keys.shape
    blocks, codes = packed.shape[2:4]
    _encode[(heads, batch)](
        keys.contiguous(),
        positions,
        *axes,
        packed,
        scales,
        blocks,
        **sizes(dim, codes),
        num_warps=WARPS,
    )


def _check(packed: Tensor, scales: Tensor) -> None:
    if not packed.is_contiguous() or not scales.is_contiguous():
        raise ValueError("codes and scales must be contiguous")


@triton.jit
@no_type_check
def _encode(
    keys, positions, basis, spread, mean, first, bits, levels, edges, packed, scales, blocks,
    D: tl.constexpr, M: tl.constexpr,
    DIM: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    head = b * tl.num_programs(0) + tl.program_id(0)
    position = tl.load(positions + b)
    if (position < 0) | (position >= blocks * 32):
        return
    e = tl.arange(0, DIM)
    m = tl.arange(0, CODES)
    width = tl.load(bits + b * M + m, mask=m < M, other=0)
    start = tl.load(first + b * M + m, mask=m < M, other=0)
    spread = tl.load(spread + head * D + e, mask=e < D, other=1.0)
    along = along_axes(keys + head * D, mean + head * D, basis + head * D * D, D, DIM, ROWS)
    along = tl.div_rn(along, spread)
    count = tl.sum(tl.where(width > 0, 4 // tl.maximum(width, 1), 0), 0)  # coordinates in use
    rms = tl.sqrt_rn(tl.div_rn(tl.sum(along * along, 0), count.to(tl.float32)))
    least = tl.where(rms < 1.1754943508222875e-38, 1.1754943508222875e-38, rms)  # NaN stays
    unit = tl.div_rn(along, tl.zeros_like(along) + least)
    code, product, square = _digits(unit, spread * spread, start, width, levels, edges, CODES)
    scale = rms * tl.div_rn(square, product)
    scale = tl.where(scale == scale, tl.minimum(scale, 65504.0), 0.0)
    row = head.to(tl.int64) * blocks
    at = packed + ((row + position // 32) * M + m) * 16 + position % 16
    old = tl.load(at, mask=m < M, other=0).to(tl.int32)
    new = tl.where(position % 32 >= 16, (old & 15) | (code << 4), (old & 240) | code)
    tl.debug_barrier()  # several lanes may read what one of them changes
    tl.store(at, new.to(tl.uint8), mask=m < M)
    tl.store(scales + row * 32 + position, scale.to(tl.float16))


@triton.jit
@no_type_check
def _digits(unit, weights, start, width, levels, edges, CODES: tl.constexpr):
    """Codes [CODES], and the sums over coordinates of u * level * weight and u * u * weight."""
    code = tl.zeros((CODES,), tl.int32)
    product = tl.zeros((CODES,), tl.float32)
    square = tl.zeros((CODES,), tl.float32)
    for j in tl.static_range(4):
        there = (j * width < 4) & (width > 0)
        place = tl.where(there, start + j, 0)
        u = tl.gather(unit, place, 0)
        weight = tl.where(there, tl.gather(weights, place, 0), 0.0)
        digit = tl.zeros((CODES,), tl.int32)
        for edge in tl.static_range(15):
            digit += ((tl.load(edges + width * 16 + edge) < u) | (u != u)).to(tl.int32)
        digit = tl.minimum(digit, (1 << width) - 1)
        code |= tl.where(there, digit << (j * width), 0)
        product += u * tl.load(levels + width * 16 + digit) * weight
        square += u * u * weight
    return code, tl.sum(product, 0), tl.sum(square, 0)


def _build(codes: int, dim: int, dtype: str) -> Build:
    pointers = {
        "keys": dtype, "positions": "*i32",
        **dict.fromkeys(("basis", "spread", "mean"), "*fp32"), "first": "*i32", "bits": "*i32",
        "levels": "*fp32", "edges": "*fp32", "packed": "*u8", "scales": "*fp16", "blocks": "i32",
    }  # fmt: skip
    constants = sizes(dim, codes)
    signature = pointers | dict.fromkeys(constants, "constexpr")
    name = f"encode, {codes} codes, D={dim}"
    return Build(name, _encode, signature, constants, num_warps=WARPS)


AOT = [
    _build(64, 128, "*bf16"),
    _build(128, 128, "*bf16"),
    _build(128, 256, "*bf16"),
    _build(40, 80, "*fp16"),
    _build(16, 64, "*fp32"),
]
