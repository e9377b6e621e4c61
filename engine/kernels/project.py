"""Few rows times a weight matrix in bf16 on a CPU: decode reads every weight once a step.

    y[n, o] = sum over i of x[n, i] w[o, i]

The definition is `torch.nn.functional.linear`. Weights are widened in registers and summed in
fp32. Two AVX512 cores, 1 row, weights of 1024 to 3072 columns: 24 to 30 GB/s of weights, where
torch's bf16 product reads 15 to 22 and plain reading takes 30; from four rows on torch is as
fast where the CPU has matrix instructions (AMX).
"""

from ctypes import c_int, c_long, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from native.library import function, library

SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # of the widest registers
MOST_ROWS = 3
ARGUMENTS = [c_void_p] * 2 + [c_long] * 3 + [c_int] + [c_void_p] * 2


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `project_native` can take these tensors on this machine, and gains by it."""
    return (
        x.numel() <= MOST_ROWS * x.shape[-1]
        and weight.dtype == x.dtype == torch.bfloat16
        and weight.is_cpu
        and x.shape[-1] % LANES == 0
        and weight.is_contiguous()
        and library(SOURCE) is not None
    )


def project_native(x: Float[Tensor, "*n I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*n O"]:
    """x Wᵀ in compiled code."""
    width, outs, x = x.shape[-1], len(weight), x.contiguous()
    n = x.numel() // width
    work = torch.empty((n + 1) * width + n * outs)
    out = torch.empty(*x.shape[:-1], outs, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    project = function(SOURCE, "project", ARGUMENTS)
    project(
        *(x.data_ptr(), weight.data_ptr(), n, width, outs, threads),
        *(work.data_ptr(), out.data_ptr()),
    )
    return out
