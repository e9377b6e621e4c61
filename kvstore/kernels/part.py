"""Rows as kernels are told of them: where K and V begin, and how they are encoded."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import UInt8
from torch import Tensor

from kvstore.rows import Int4, Int8, Raw, RowCodec, RowLayout

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Part(NamedTuple):
    """K or V in a row; bytes are counted from the row's first."""

    kind: str  # "bfloat16", "float16", "float32", "int8", "int4"; "" where a row holds none
    at: int  # byte where it begins
    end: int  # byte behind it
    scales: int  # byte where scales begin; `end` where there are none
    group: int  # numbers with one scale; head_dim where there is one or none
    run: int  # numbers, a power of two: every run of either half of a row has one scale
    runs: int  # room for those of a half, a power of two


def parts(layout: RowLayout) -> tuple[Part, Part]:
    """K and V. Raises ValueError for a codec that kernels do not know."""
    dim = layout.head_dim
    return _part(layout.k, layout.k_at, dim), _part(layout.v, layout.v_at, dim)


def constants(layout: RowLayout, *fields: str) -> dict[str, object]:
    """What kernels are specialised for: ROW in bytes, D, and fields of the parts, as K_AT."""
    found: dict[str, object] = {"ROW": layout.row_bytes, "D": layout.head_dim}
    for name, part in zip("KV", parts(layout), strict=True):
        found |= {f"{name}_{field.upper()}": getattr(part, field) for field in fields}
    return found


def hot_rows(layout: RowLayout) -> RowLayout:
    """How a hot buffer keeps what a slab keeps so: the numbers, ready to attend to."""
    numbers = Raw(layout.dtype)
    return RowLayout(numbers, numbers, layout.head_dim, layout.dtype)


def hot_constants(hot_layout: RowLayout) -> dict[str, int]:
    """Of a hot row, in numbers: its size, and where V begins."""
    size = hot_layout.dtype.itemsize
    return {"HOT_ROW": hot_layout.row_bytes // size, "HOT_V": hot_layout.v_at // size}


def common_layouts() -> dict[str, RowLayout]:
    """Slabs for which kernels are compiled ahead of time, by name."""
    bf16, half, wide = torch.bfloat16, torch.float16, torch.float32
    return {
        "raw bf16, D=128": RowLayout(Raw(bf16), Raw(bf16), 128, bf16),
        "raw fp32, D=80": RowLayout(Raw(wide), Raw(wide), 80, wide),
        "raw fp16 values only, D=64": RowLayout(None, Raw(half), 64, half),
        "int8 | int4, D=80": RowLayout(Int8(), Int4(), 80, bf16),
        "int4 | int4, D=128": RowLayout(Int4(), Int4(), 128, bf16),
        "int8 | int8, D=128": RowLayout(Int8(), Int8(), 128, half),
    }


def check_rows(
    slab: UInt8[Tensor, "blocks Hk P row"],
    hot: UInt8[Tensor, "B Hk S hot_row"],
    layout: RowLayout,
    hot_layout: RowLayout,
) -> None:
    """Raises ValueError unless memory is whole, and hot rows are numbers of the slab's dtype."""
    if hot_layout != (wanted := hot_rows(layout)):
        raise ValueError(f"hot rows must be {wanted}, got {hot_layout}")
    for name, rows, size in (("slab", slab, layout), ("hot", hot, hot_layout)):
        if not rows.is_contiguous() or rows.shape[3] != size.row_bytes:
            raise ValueError(
                f"{name} must be contiguous rows of {size.row_bytes} bytes, got shape "
                f"{tuple(rows.shape)}, strides {rows.stride()}"
            )


def _part(codec: RowCodec | None, at: int, dim: int) -> Part:
    half = -(-dim // 2)
    whole = triton.next_power_of_2(half)
    if codec is None:
        return Part("", at, at, at, dim, whole, 1)
    end = at + codec.row_bytes(dim)
    if isinstance(codec, Raw):
        return Part(codec.name, at, end, end, dim, whole, 1)
    if isinstance(codec, Int8):
        return Part(codec.name, at, end, end - 4, dim, whole, 1)
    if isinstance(codec, Int4):
        both = half | codec.group
        run = both & -both
        scales = at + codec.scales_at(dim)
        return Part(codec.name, at, end, scales, codec.group, run, whole // run)
    raise ValueError(f"no kernel for rows encoded as {codec.name}")


@triton.jit
@no_type_check
def numbers_at(row, AT: tl.constexpr, KIND: tl.constexpr):
    """Pointer to the numbers of a raw part of a row, or of rows."""
    if KIND == "float32":
        numbers = (row + AT).to(tl.pointer_type(tl.float32))
    elif KIND == "float16":
        numbers = (row + AT).to(tl.pointer_type(tl.float16))
    else:
        numbers = (row + AT).to(tl.pointer_type(tl.bfloat16))
    return numbers
