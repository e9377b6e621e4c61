"""RMS norm of a few rows in bf16 on a CPU: one pass where torch runs seven small operations.

    y[n, i] = w[i] x[n, i] / sqrt(eps + mean over j of x[n, j]²)

Squares are summed in fp32 (Zhang & Sennrich 2019); the quotient is rounded before it meets its
weight, as `transformers` does it for Llama and most of its kin.
"""

from ctypes import c_float, c_long, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from native.library import function, library

SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # of the widest registers
MOST_VALUES = 1 << 16  # torch's threads win beyond it
MOST_WIDTH = 1 << 13  # of a row that a GPU's program has in its registers
ARGUMENTS = [*[c_void_p] * 2, *[c_long] * 2, c_float, *[c_void_p] * 2]


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm_native` can take these tensors on this machine, and gains by it."""
    return (
        x.numel() <= MOST_VALUES
        and weight.dtype == x.dtype == torch.bfloat16
        and weight.is_cpu
        and x.shape[-1] % LANES == 0
        and library(SOURCE) is not None
    )


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `norm_rows` can take these tensors, on a GPU."""
    return (
        x.is_cuda
        and weight.dtype == x.dtype
        and len(weight) <= MOST_WIDTH
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def rms_norm_native(
    x: Float[Tensor, "*n I"], weight: Float[Tensor, " I"], eps: float
) -> Float[Tensor, "*n I"]:
    """The norm of every row, in compiled code."""
    x, weight = x.contiguous(), weight.contiguous()
    width, out = len(weight), torch.empty_like(x)
    work = torch.empty(2 * width)
    norm = function(SOURCE, "rms_norm", ARGUMENTS)
    norm(
        *(x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps),
        *(work.data_ptr(), out.data_ptr()),
    )
    return out


def rms_norm_torch(
    x: Float[Tensor, "*n I"], weight: Float[Tensor, " I"], eps: float
) -> Float[Tensor, "*n I"]:
    """The definition."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)
