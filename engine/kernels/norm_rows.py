"""RMS norm of rows on a GPU, in one launch where torch makes eight: a decode step has 65 of them.

    y[n, i] = w[i] x[n, i] / sqrt(eps + mean over j of x[n, j]²)

The definition, and where it is rounded, stand in `rms_norm`, which is the same for a CPU. One
program a row: each number is read once and written once.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from engine.kernels.rms_norm import MOST_WIDTH, rms_norm_torch
from native.gpu import Build, on_gpu

WARP_NUMBERS = 512  # that each of its warps has


def norm_rows(
    x: Float[Tensor, "*n I"], weight: Float[Tensor, " I"], eps: float
) -> Float[Tensor, "*n I"]:
    """The norm of every row, of what `rms_norm.fits` takes on a GPU."""
    run = norm_rows_triton if on_gpu(x, weight) else rms_norm_torch
    return run(x, weight, eps)


def norm_rows_triton(
    x: Float[Tensor, "*n I"], weight: Float[Tensor, " I"], eps: float
) -> Float[Tensor, "*n I"]:
    """By the kernel."""
    width = len(weight)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        padded = triton.next_power_of_2(width)
        with torch.cuda.device_of(x):  # Triton launches on the thread's device, whatever it gets
            _norm_rows[(x.numel() // width,)](
                *(x, weight.contiguous(), out, eps),
                WIDTH=width,
                PADDED=padded,
                num_warps=_warps(padded),
            )
    return out


def _warps(padded: int) -> int:
    return max(1, min(16, padded // WARP_NUMBERS))


@triton.jit
@no_type_check
def _norm_rows(x, weight, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """One row."""
    i = tl.arange(0, PADDED)
    at = tl.program_id(0).to(tl.int64) * WIDTH + i
    row = tl.load(x + at, mask=i < WIDTH, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(row * row, 0), WIDTH * 1.0)
    scaled = (row * tl.rsqrt(mean + eps)).to(out.dtype.element_ty)
    weights = tl.load(weight + i, mask=i < WIDTH, other=0.0)
    tl.store(out + at, weights.to(tl.float32) * scaled.to(tl.float32), mask=i < WIDTH)


def _build(dtype: str, width: int) -> Build:
    padded = triton.next_power_of_2(width)
    signature = dict.fromkeys(("x", "weight", "out"), dtype) | {"eps": "fp32"}
    constants = {"WIDTH": width, "PADDED": padded}
    signature |= dict.fromkeys(constants, "constexpr")
    return Build(f"norm_rows, {dtype}, {width}", _norm_rows, signature, constants, _warps(padded))


AOT: list[Build] = [
    _build("*bf16", 4096),
    _build("*bf16", 128),
    _build("*fp16", 5120),
    _build("*fp32", MOST_WIDTH),
]
