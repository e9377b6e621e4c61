"""Few rows times a weight matrix in bf16 on a CPU: decode reads every weight once a step.

    y[n, o] = sum over i of x[n, i] w[o, i]

The definition is `torch.nn.functional.linear`. Weights are widened in registers and summed in
fp32. Two AVX512 cores, 1 row, weights of 1024 to 3072 columns: 24 to 30 GB/s of weights, where
torch's bf16 product reads 15 to 22 and plain reading takes 30; from four rows on torch is as
fast where the CPU has matrix instructions (AMX).
"""

import ctypes
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from native.library import library

SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # of the widest registers
MOST_ROWS = 3


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `project_native` can take these tensors on this machine, and gains by it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == x.dtype == torch.bfloat16
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and x.shape[-1] % LANES == 0
        and weight.is_contiguous()
        and library(SOURCE) is not None
    )


def project_native(x: Float[Tensor, "*n I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*n O"]:
    """x Wᵀ in compiled code."""
    code = library(SOURCE)
    assert code is not None, "ask serves() first"
    rows = x.flatten(0, -2).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    (n, width), outs = rows.shape, len(weight)
    work, out = torch.empty(width), torch.empty(n, outs)
    code.project(
        *(ctypes.c_void_p(t.data_ptr()) for t in (rows, weight)),
        *(ctypes.c_long(size) for size in (n, width, outs)),
        ctypes.c_int(torch.get_num_threads()),
        *(ctypes.c_void_p(t.data_ptr()) for t in (work, out)),
    )
    return out.to(x.dtype).view(*x.shape[:-1], outs)
