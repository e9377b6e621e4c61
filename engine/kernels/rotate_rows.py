"""The newest queries and keys of a batch, rotated: one launch where torch makes nine.

    y[b, h, i]        = x[b, h, i] cos[b, i] - x[b, h, i + half] sin[b, i]
    y[b, h, i + half] = x[b, h, i + half] cos[b, i] + x[b, h, i] sin[b, i]

in fp32, rounded once; the definition is `rotate_torch`, of one token per request (RoFormer, Su et
al. 2021). What is behind the first 2 half dimensions stays as it is. One program a row.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from engine.kernels.rotate import rotate_torch
from native.gpu import Build, on_gpu


def rotate_rows(
    q: Float[Tensor, "B Hq D"],
    k: Float[Tensor, "B Hk D"],
    cos: Float32[Tensor, "B half"],
    sin: Float32[Tensor, "B half"],
    *,
    interleaved: bool,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hk D"]]:
    """Queries and keys of a token of each request, rotated by row b of `cos` and `sin`."""
    run = rotate_rows_triton if on_gpu(q, k, cos, sin) else rotate_rows_torch
    return run(q, k, cos, sin, interleaved=interleaved)


def rotate_rows_torch(
    q: Float[Tensor, "B Hq D"],
    k: Float[Tensor, "B Hk D"],
    cos: Float32[Tensor, "B half"],
    sin: Float32[Tensor, "B half"],
    *,
    interleaved: bool,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hk D"]]:
    """The definition."""
    both = torch.cat([q, k], 1).transpose(0, 1)
    turned = rotate_torch(both, cos, sin, interleaved=interleaved).transpose(0, 1)
    rotated_q, rotated_k = turned.split([q.shape[1], k.shape[1]], 1)
    return rotated_q.contiguous(), rotated_k.contiguous()


def rotate_rows_triton(
    q: Float[Tensor, "B Hq D"],
    k: Float[Tensor, "B Hk D"],
    cos: Float32[Tensor, "B half"],
    sin: Float32[Tensor, "B half"],
    *,
    interleaved: bool,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hk D"]]:
    """The same by the kernel."""
    (batch, queries, dim), keys = q.shape, k.shape[1]
    whole = torch.contiguous_format
    out = torch.empty_like(q, memory_format=whole), torch.empty_like(k, memory_format=whole)
    _rotate_rows[(queries + keys, batch)](
        *(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous(), *out),
        *(queries, keys),
        **_constants(dim, cos.shape[1], interleaved=interleaved),
        num_warps=1,
    )
    return out


def _constants(dim: int, half: int, *, interleaved: bool) -> dict[str, Any]:
    rest = dim - 2 * half
    return {
        "D": dim,
        "HALF": half,
        "HP": triton.next_power_of_2(half),
        "RP": triton.next_power_of_2(rest) if rest else None,
        "INTERLEAVED": interleaved,
    }


@triton.jit
@no_type_check
def _rotate_rows(
    q, k, cos, sin, to_q, to_k, queries, keys,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One row: a query's or, behind all of these, a key's."""
    head, b = tl.program_id(0), tl.program_id(1)
    if head < queries:
        _turn(q, to_q, cos, sin, b * queries + head, b, D, HALF, HP, RP, INTERLEAVED)
    else:
        _turn(k, to_k, cos, sin, b * keys + head - queries, b, D, HALF, HP, RP, INTERLEAVED)


@triton.jit
@no_type_check
def _turn(
    x, to, cos, sin, row, b,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, HP)
    x += row * D
    to += row * D
    first = 2 * i if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else i + HALF
    one = tl.load(x + first, mask=i < HALF, other=0.0).to(tl.float32)
    other = tl.load(x + second, mask=i < HALF, other=0.0).to(tl.float32)
    c = tl.load(cos + b * HALF + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + b * HALF + i, mask=i < HALF, other=0.0)
    tl.store(to + first, one * c - other * s, mask=i < HALF)
    tl.store(to + second, other * c + one * s, mask=i < HALF)
    if RP is not None:
        behind = 2 * HALF + tl.arange(0, RP)
        tl.store(to + behind, tl.load(x + behind, mask=behind < D), mask=behind < D)


def _build(dtype: str, dim: int, half: int, *, interleaved: bool = False) -> Build:
    constants = _constants(dim, half, interleaved=interleaved)
    signature = dict.fromkeys(("q", "k", "to_q", "to_k"), dtype)
    signature |= {"cos": "*fp32", "sin": "*fp32", "queries": "i32", "keys": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"rotate_rows, {dtype}, D={dim}, half {half}, interleaved {interleaved}"
    return Build(name, _rotate_rows, signature, constants, num_warps=1)


AOT: list[Build] = [
    _build("*bf16", 128, 64),
    _build("*bf16", 128, 32, interleaved=True),
    _build("*fp16", 80, 40),
    _build("*fp32", 256, 128),
]
