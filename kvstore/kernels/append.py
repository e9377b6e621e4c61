"""The row of a new token, to the slab in host memory and to its hot slot.

    slab[blocks[b, p // P], h, p % P] = encoded (k, v)[b, h]       p = positions[b]
    hot[b, h, slots[b, h]]            = (k, v)[b, h]

Encoding is that of the slab's codecs, byte for byte as on a CPU: quotients are rounded as IEEE
says, and whole numbers to the nearest, of two to the even one. (Where the least of 4-bit numbers
is 0, its sign is not defined: torch's own depends on the order of reading.) Bytes between and
behind parts become 0, since rows may go to disk. Nothing waits for the link: writes are posted.

One program of one warp a row: B * Hk rows are at most some hundred, of at most 1 KiB.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from kvstore.kernels.part import (
    POINTERS,
    check_rows,
    common_layouts,
    constants,
    hot_constants,
    hot_rows,
    numbers_at,
)
from kvstore.kernels.put import put
from kvstore.rows import RowLayout
from native.gpu import Build

WHOLE = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it rounds what is below 2**22
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LEAST_STEP = tl.constexpr(2.0**-24)  # the smallest fp16
LARGEST = tl.constexpr(torch.finfo(torch.float16).max)


def append(
    k: Float[Tensor, "B Hk D"],
    v: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    slab: UInt8[Tensor, "blocks Hk P row"],
    blocks: Int32[Tensor, "B N"],
    layout: RowLayout,
    hot: UInt8[Tensor, "B Hk S hot_row"],
    hot_layout: RowLayout,
    slots: Int32[Tensor, "B Hk"],
) -> None:
    """Write the KV of one token a request; nothing where its position is -1.

    Args:
        k: as rows keep it, rotated; not written to the slab where its rows hold no keys.
        slab: in memory that the device of `hot` writes: its own, or page-locked.
        blocks: block i of b holds its tokens from i * P; -1: none, and the slab is left alone.
        slots: of the hot buffers; -1: none, and they are left alone.
    Raises:
        ValueError: if hot rows are not numbers of the layout's dtype, or memory is not contiguous.
    """
    check_rows(slab, hot, layout, hot_layout)
    run = append_triton if hot.is_cuda else append_torch
    run(k, v, positions, slab, blocks, layout, hot, hot_layout, slots)


def append_torch(
    k: Float[Tensor, "B Hk D"],
    v: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    slab: UInt8[Tensor, "blocks Hk P row"],
    blocks: Int32[Tensor, "B N"],
    layout: RowLayout,
    hot: UInt8[Tensor, "B Hk S hot_row"],
    hot_layout: RowLayout,
    slots: Int32[Tensor, "B Hk"],
) -> None:
    """The definition."""
    (batch, heads, size, _), per_block = hot.shape, slab.shape[2]
    there, position = positions >= 0, positions.clamp_min(0).long()
    block = blocks.gather(1, position[:, None] // per_block).long()
    head = torch.arange(heads, device=slab.device)
    row = (block * heads + head) * per_block + position[:, None] % per_block
    at = row.where(there[:, None] & (block >= 0), -1).flatten()
    put(slab.view(-1, layout.row_bytes), at, layout.encode(k, v).flatten(0, 1))
    row = torch.arange(batch * heads, device=slab.device).view(batch, heads) * size + slots
    at = row.where(there[:, None] & (slots >= 0), -1).flatten()
    memory = hot.view(layout.dtype).view(batch * heads * size, -1)
    for numbers, first in ((k, hot_layout.k_at), (v, hot_layout.v_at)):
        lo = first // layout.dtype.itemsize
        put(memory[:, lo : lo + layout.head_dim], at, numbers.to(layout.dtype).flatten(0, 1))


def append_triton(
    k: Float[Tensor, "B Hk D"],
    v: Float[Tensor, "B Hk D"],
    positions: Int32[Tensor, " B"],
    slab: UInt8[Tensor, "blocks Hk P row"],
    blocks: Int32[Tensor, "B N"],
    layout: RowLayout,
    hot: UInt8[Tensor, "B Hk S hot_row"],
    hot_layout: RowLayout,
    slots: Int32[Tensor, "B Hk"],
) -> None:
    """By the kernel."""
    batch, heads, size, _ = hot.shape
    numbers = hot.view(layout.dtype)
    _append[(batch * heads,)](
        k.contiguous(), v.contiguous(), positions.contiguous(), slab, blocks.contiguous(), numbers,
        slots.contiguous(), size, blocks.shape[1],
        HK=heads, P=slab.shape[2], **_constants(layout, hot_layout), num_warps=1,
    )  # fmt: skip


def _constants(layout: RowLayout, hot_layout: RowLayout) -> dict[str, object]:
    found = constants(layout, "kind", "at", "end", "scales", "group")
    half = triton.next_power_of_2(-(-layout.head_dim // 2))
    return found | hot_constants(hot_layout) | {"HALF": half}


@triton.jit
@no_type_check
def _append(
    k, v, positions, slab, blocks, hot, slots, S, N, HK: tl.constexpr, P: tl.constexpr,
    HOT_ROW: tl.constexpr, HOT_V: tl.constexpr,
    ROW: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, K_END: tl.constexpr,
    K_KIND: tl.constexpr, K_AT: tl.constexpr, K_SCALES: tl.constexpr, K_GROUP: tl.constexpr,
    V_KIND: tl.constexpr, V_AT: tl.constexpr, V_SCALES: tl.constexpr, V_GROUP: tl.constexpr,
    V_END: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    position = tl.load(positions + head // HK)
    if position >= 0:
        k += head * D
        v += head * D
        slot = tl.load(slots + head)
        if slot >= 0:
            to = hot + (head.to(tl.int64) * S + slot) * HOT_ROW
            _copy(k, to, D, HALF)
            _copy(v, to + HOT_V, D, HALF)
        block = tl.load(blocks + head // HK * N + position // P)
        if block >= 0:
            row = slab + ((block.to(tl.int64) * HK + head % HK) * P + position % P) * ROW
            if K_KIND != "":
                _encode(k, row, K_AT, K_SCALES, K_GROUP, K_KIND, D, HALF)
            _encode(v, row, V_AT, V_SCALES, V_GROUP, V_KIND, D, HALF)
            _zero(row, K_END, V_AT)
            _zero(row, V_END, ROW)


@triton.jit
@no_type_check
def _encode(
    x, row, AT: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if KIND == "int4":
        _int4(x, row, AT, SCALES, GROUP, D, HALF)
    elif KIND == "int8":
        _int8(x, row, AT, SCALES, D, HALF)
    else:
        _copy(x, numbers_at(row, AT, KIND), D, HALF)


@triton.jit
@no_type_check
def _copy(x, to, D: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, 2 * HALF)
    tl.store(to + i, tl.load(x + i, mask=i < D).to(to.dtype.element_ty), mask=i < D)


@triton.jit
@no_type_check
def _zero(row, START: tl.constexpr, STOP: tl.constexpr):
    if STOP > START:  # by less than a row's alignment
        at = START + tl.arange(0, 16)
        tl.store(row + at, tl.zeros([16], tl.uint8), mask=at < STOP)


@triton.jit
@no_type_check
def _int8(x, row, AT: tl.constexpr, SCALES: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, 2 * HALF)
    wide = tl.load(x + i, mask=i < D, other=0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), 0), 127.0), TINY)
    codes = _whole(tl.div_rn(wide, scale)).to(tl.int8)
    tl.store((row + AT).to(tl.pointer_type(tl.int8)) + i, codes, mask=i < D)
    tl.store((row + SCALES).to(tl.pointer_type(tl.float32)), scale)
    _zero(row, AT + D, SCALES)


@triton.jit
@no_type_check
def _int4(
    x, row, AT: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of the numbers at once: number i and i + SPLIT share a byte."""
    SPLIT: tl.constexpr = (D + 1) // 2
    i = tl.arange(0, HALF)
    in_low, in_high = i < SPLIT, i < D - SPLIT
    low = tl.load(x + i, mask=in_low, other=0).to(tl.float32)
    high = tl.load(x + SPLIT + i, mask=in_high, other=0).to(tl.float32)
    low_code, high_code = tl.zeros([HALF], tl.uint8), tl.zeros([HALF], tl.uint8)
    scales = (row + SCALES).to(tl.pointer_type(tl.float16))
    for g in tl.static_range((D + GROUP - 1) // GROUP):
        mine_low, mine_high = in_low & (i // GROUP == g), in_high & ((SPLIT + i) // GROUP == g)
        least = _fp16(tl.minimum(_least(low, mine_low), _least(high, mine_high)))
        most = -tl.minimum(_least(-low, mine_low), _least(-high, mine_high))
        scale = tl.maximum(_fp16(tl.div_rn(most - least, 15.0)), LEAST_STEP)
        tl.store(scales + 2 * g, scale.to(tl.float16))
        tl.store(scales + 2 * g + 1, least.to(tl.float16))
        low_code = tl.where(mine_low, _code(low, scale, least), low_code)
        high_code = tl.where(mine_high, _code(high, scale, least), high_code)
    tl.store(row + AT + i, low_code | high_code << 4, mask=in_low)
    _zero(row, AT + SPLIT, SCALES)


@triton.jit
@no_type_check
def _least(x, here):
    return tl.min(tl.where(here, x, float("inf")), 0)


@triton.jit
@no_type_check
def _code(x, scale, least):
    whole = _whole(tl.div_rn(x - least, scale))
    return tl.minimum(tl.maximum(whole, 0.0), 15.0).to(tl.uint8)


@triton.jit
@no_type_check
def _fp16(x):
    """As fp16 has it, in fp32; the largest instead of infinity."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(tl.float16).to(tl.float32)


@triton.jit
@no_type_check
def _whole(x):
    """The nearest whole number, of two the even one; far away, some number as far away."""
    return x + WHOLE - WHOLE


def _build(name: str, layout: RowLayout) -> Build:
    kind = POINTERS[layout.dtype]
    values = _constants(layout, hot_rows(layout)) | {"HK": 8, "P": 64}
    signature = dict.fromkeys(("k", "v", "hot"), kind) | {"slab": "*u8", "S": "i32", "N": "i32"}
    signature |= dict.fromkeys(("positions", "blocks", "slots"), "*i32")
    constexprs = dict.fromkeys(values, "constexpr")
    return Build(f"append, {name}", _append, signature | constexprs, values, num_warps=1)


AOT = [_build(name, layout) for name, layout in common_layouts().items()]
