"""Rotary position embedding on a CPU: one pass where torch runs eight operations.

    y[h, t, i]        = x[h, t, i] cos[t, i] - x[h, t, i + half] sin[t, i]
    y[h, t, i + half] = x[h, t, i + half] cos[t, i] + x[h, t, i] sin[t, i]

in fp32, rounded once, and bit for bit what the definition gives (RoFormer, Su et al. 2021). What
is behind the first 2 half dimensions stays as it is. Heads, runs of tokens and tokens may lie
anywhere.
"""

from ctypes import c_int, c_long, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from native.library import function, library

SOURCE = Path(__file__).with_suffix(".c")
MOST_DIMS = 512  # that turn
VALUES_OF_A_THREAD = 1 << 15  # fewer take less time than to wake it
ARGUMENTS = [
    c_void_p, *[c_long] * 4, c_void_p, c_void_p, *[c_long] * 4, *[c_int] * 3,
    c_void_p, c_long, c_long,
]  # fmt: skip


def serves(x: Tensor, cos: Tensor) -> bool:
    """Whether `rotate_native` can take these tensors on this machine."""
    return (
        x.is_cpu
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.dim() in (3, 4)
        and cos.shape[0] == x.shape[1:-1].numel()
        and cos.dim() == 2
        and cos.dtype == torch.float32
        and 2 * cos.shape[1] <= MOST_DIMS
        and x.stride(-1) == 1
        and not (x.requires_grad and torch.is_grad_enabled())
        and library(SOURCE) is not None
    )


def rotate_native(
    x: Float[Tensor, "H T D"] | Float[Tensor, "H B P D"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    *,
    interleaved: bool,
    out: Float[Tensor, "H T D"] | None = None,
) -> Float[Tensor, "H T D"]:
    """The rotation in compiled code, of T tokens or of B runs of P, T in all."""
    runs = x if x.dim() == 4 else x[:, None]
    (heads, tokens, dim), nbytes = (len(x), len(cos), x.shape[-1]), x.element_size()
    out = torch.empty((heads, tokens, dim), dtype=x.dtype) if out is None else out
    cos, sin = cos.contiguous(), sin.contiguous()
    threads = min(torch.get_num_threads(), 1 + x.numel() // VALUES_OF_A_THREAD)
    rotate = function(SOURCE, "rotate", ARGUMENTS)
    rotate(
        *(x.data_ptr(), *(step * nbytes for step in runs.stride()[:3]), max(1, runs.shape[2])),
        *(cos.data_ptr(), sin.data_ptr(), heads, tokens, dim, cos.shape[1]),
        *(interleaved, x.dtype == torch.bfloat16, threads),
        *(out.data_ptr(), out.stride(0) * nbytes, out.stride(1) * nbytes),
    )
    return out


def rotate_torch(
    x: Float[Tensor, "H T D"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    *,
    interleaved: bool,
) -> Float[Tensor, "H T D"]:
    """The definition."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)
