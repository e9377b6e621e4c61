"""Rows of missing tokens, from the slab in host memory to their slots in the hot buffers.

    hot[b, h, target[i]] = decoded slab[blocks[b, t // P], h, t % P]    for t = missing[b, h, i]

The slab is page-locked host memory, which the kernel reads over PCIe by its own address: no copy
is planned on the host, and only the rows asked for travel (SGLang's HiSparse and ShadowKV gather
so). K and V are decoded in registers from the slab's codecs to the numbers that attention reads.

All missing tokens of the batch are one list, cut into tiles: a program finds out by the sums of
`count` whose token it has, so no program waits while another has a long head. 64 programs of 4
warps each ask for about 8 KiB of rows, K and V, before they write one of them: 0.3 to 0.5 MiB in
all, where a link of 55 GB/s with 2 us of delay holds 0.1 and finding rows takes as long again. They
leave at least half of every processor to other kernels, and half of the 132 processors whole.
A row's halves are read as two tiles: 16 bytes a thread, 128 bytes in a line at D = 128 in bf16, and
4-bit codes, which hold number i and i + D / 2 in a byte, are read once.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, UInt8
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
from kvstore.kernels.resolve import Resolved
from kvstore.rows import RowLayout
from native.gpu import Build

PROGRAMS = 64
TILE_BYTES = 1 << 13
SEARCHED = 1 << 12  # places looked at at once by a program's 128 threads


def gather(
    slab: UInt8[Tensor, "blocks Hk P row"],
    blocks: Int32[Tensor, "B N"],
    layout: RowLayout,
    resolved: Resolved,
    hot: UInt8[Tensor, "B Hk S hot_row"],
    hot_layout: RowLayout,
) -> None:
    """Fill the slots of what was missing. Where rows hold no keys, K of a hot row is left alone.

    Args:
        slab: in memory that the device of `hot` reads: its own, or page-locked.
        blocks: block i of b holds its tokens from i * P; -1: none, and nothing is written.
    Raises:
        ValueError: if hot rows are not numbers of the layout's dtype, or memory is not contiguous.
    """
    check_rows(slab, hot, layout, hot_layout)
    run = gather_triton if hot.is_cuda else gather_torch
    run(slab, blocks, layout, resolved, hot, hot_layout)


def gather_torch(
    slab: UInt8[Tensor, "blocks Hk P row"],
    blocks: Int32[Tensor, "B N"],
    layout: RowLayout,
    resolved: Resolved,
    hot: UInt8[Tensor, "B Hk S hot_row"],
    hot_layout: RowLayout,
) -> None:
    """The definition."""
    (batch, heads, slots, _), per_block = hot.shape, slab.shape[2]
    token = resolved.missing.clamp_min(0).long()
    owned = blocks[:, None].expand(-1, heads, -1).gather(2, token // per_block)
    head = torch.arange(heads, device=slab.device)[:, None]
    rows = slab[owned.clamp_min(0).long(), head, token % per_block]
    k, v = layout.decode(rows.flatten(0, 1))
    row = torch.arange(batch * heads, device=slab.device).view(batch, heads, 1)
    writes = (resolved.target >= 0) & (owned >= 0)
    at = (row * slots + resolved.target).where(writes, -1).flatten()
    memory = hot.view(layout.dtype).view(batch * heads * slots, -1)
    for numbers, first in ((k, hot_layout.k_at), (v, hot_layout.v_at)):
        if numbers is not None:
            lo = first // layout.dtype.itemsize
            put(memory[:, lo : lo + layout.head_dim], at, numbers.flatten(0, 1))


def gather_triton(
    slab: UInt8[Tensor, "blocks Hk P row"],
    blocks: Int32[Tensor, "B N"],
    layout: RowLayout,
    resolved: Resolved,
    hot: UInt8[Tensor, "B Hk S hot_row"],
    hot_layout: RowLayout,
) -> None:
    """By the kernel."""
    batch, heads, slots, _ = hot.shape
    lists = (x.contiguous() for x in (resolved.missing, resolved.target, resolved.count))
    _gather[(PROGRAMS,)](
        slab, blocks.contiguous(), *lists, hot.view(layout.dtype),
        batch * heads, resolved.missing.shape[2], slots, blocks.shape[1],
        HK=heads, P=slab.shape[2],
        **_constants(layout, hot_layout, batch * heads),
    )  # fmt: skip


def _constants(layout: RowLayout, hot_layout: RowLayout, lists: int) -> dict[str, object]:
    """Of many lists fewer rows at once: each row is looked for in all of them, in registers."""
    found = constants(layout, "kind", "at", "scales", "group", "run", "runs")
    lists = triton.next_power_of_2(lists)
    rows = triton.next_power_of_2(TILE_BYTES // layout.row_bytes)
    tile = max(1, min(max(4, rows), 32, SEARCHED // lists))
    return found | hot_constants(hot_layout) | {"LISTS": lists, "TILE": tile}


@triton.jit
@no_type_check
def _gather(
    slab, blocks, missing, target, count, hot, lists, K, S, N,
    HK: tl.constexpr, P: tl.constexpr, LISTS: tl.constexpr, TILE: tl.constexpr,
    HOT_ROW: tl.constexpr, HOT_V: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr,
    K_KIND: tl.constexpr, K_AT: tl.constexpr, K_SCALES: tl.constexpr, K_GROUP: tl.constexpr,
    K_RUN: tl.constexpr, K_RUNS: tl.constexpr,
    V_KIND: tl.constexpr, V_AT: tl.constexpr, V_SCALES: tl.constexpr, V_GROUP: tl.constexpr,
    V_RUN: tl.constexpr, V_RUNS: tl.constexpr,
):  # fmt: skip
    each = tl.arange(0, LISTS)
    ends = tl.cumsum(tl.load(count + each, mask=each < lists, other=0), 0)
    total = tl.max(ends, 0)
    for first in range(tl.program_id(0) * TILE, total, tl.num_programs(0) * TILE):
        item = first + tl.arange(0, TILE)
        behind = ends[:, None] <= item[None, :]
        head = tl.sum(behind.to(tl.int32), 0)
        nth = item - tl.max(tl.where(behind, ends[:, None], 0), 0)
        listed = item < total
        at = head.to(tl.int64) * K + nth
        token = tl.load(missing + at, mask=listed, other=0)
        slot = tl.load(target + at, mask=listed, other=0)
        block = tl.load(blocks + head // HK * N + token // P, mask=listed, other=-1)
        here = block >= 0
        row = slab + ((block.to(tl.int64) * HK + head % HK) * P + token % P) * ROW
        to = hot + (head.to(tl.int64) * S + slot) * HOT_ROW
        v = _numbers(row, here, V_AT, V_SCALES, V_GROUP, V_RUN, V_RUNS, V_KIND, D)
        if K_KIND != "":
            k = _numbers(row, here, K_AT, K_SCALES, K_GROUP, K_RUN, K_RUNS, K_KIND, D)
            _write(to, here, k[0], k[1], D)
        _write(to + HOT_V, here, v[0], v[1], D)


@triton.jit
@no_type_check
def _write(to, here, low, high, D: tl.constexpr):
    """Both halves of rows of D numbers, [TILE, runs, RUN] each."""
    SPLIT: tl.constexpr = (D + 1) // 2
    kind = to.dtype.element_ty
    i = _index(low.shape[1], low.shape[2])
    to, here = to[:, None, None], here[:, None, None]
    tl.store(to + i, low.to(kind), mask=here & (i < SPLIT))
    tl.store(to + SPLIT + i, high.to(kind), mask=here & (i < D - SPLIT))


@triton.jit
@no_type_check
def _index(RUNS: tl.constexpr, RUN: tl.constexpr):
    """Which number of a half: [1, RUNS, RUN]."""
    return tl.arange(0, RUNS)[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]


@triton.jit
@no_type_check
def _numbers(
    row, here, AT: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr,
    RUNS: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The first and the second half of the numbers of a part of rows, [TILE, runs, RUN] each."""
    SPLIT: tl.constexpr = (D + 1) // 2
    i = _index(RUNS, RUN)
    in_low, in_high = (i < SPLIT) & here[:, None, None], (i < D - SPLIT) & here[:, None, None]
    if KIND == "int4":
        codes = tl.load(row[:, None, None] + AT + i, mask=in_low, other=0)
        first = tl.arange(0, RUNS)[None, :] * RUN
        scales = (row + SCALES).to(tl.pointer_type(tl.float16))[:, None]
        low = scales + first // GROUP * 2
        high = scales + (SPLIT + first) // GROUP * 2
        low = _unpacked(codes & 15, low, here[:, None] & (first < SPLIT))
        high = _unpacked(codes >> 4, high, here[:, None] & (first < D - SPLIT))
    elif KIND == "int8":
        scale = tl.load((row + SCALES).to(tl.pointer_type(tl.float32)), mask=here, other=0)
        codes = (row + AT).to(tl.pointer_type(tl.int8))[:, None, None] + i
        low = tl.load(codes, mask=in_low, other=0).to(tl.float32) * scale[:, None, None]
        high = tl.load(codes + SPLIT, mask=in_high, other=0).to(tl.float32) * scale[:, None, None]
    else:
        numbers = numbers_at(row, AT, KIND)[:, None, None] + i
        low = tl.load(numbers, mask=in_low, other=0)
        high = tl.load(numbers + SPLIT, mask=in_high, other=0)
    return low, high


@triton.jit
@no_type_check
def _unpacked(codes, scales, here):
    """code * scale + least; the product of 4 and 11 bits is exact, so fusing changes nothing."""
    scale = tl.load(scales, mask=here, other=0).to(tl.float32)[:, :, None]
    least = tl.load(scales + 1, mask=here, other=0).to(tl.float32)[:, :, None]
    return codes.to(tl.float32) * scale + least


def _build(name: str, layout: RowLayout, lists: int = 64) -> Build:
    values = _constants(layout, hot_rows(layout), lists) | {"HK": 8, "P": 64}
    signature = {"slab": "*u8", "hot": POINTERS[layout.dtype]}
    signature |= dict.fromkeys(("blocks", "missing", "target", "count"), "*i32")
    signature |= dict.fromkeys(("lists", "K", "S", "N"), "i32")
    constexprs = dict.fromkeys(values, "constexpr")
    return Build(f"gather, {name}, {lists} lists", _gather, signature | constexprs, values)


AOT = [_build(name, layout) for name, layout in common_layouts().items()]
AOT += [_build(name, layout, 1024) for name, layout in common_layouts().items() if "bf16" in name]
