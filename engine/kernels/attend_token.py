"""Attention of one token on a CPU: every key and value is read once, by all queries of its head.

    out[h, g] = sum over j of p[j] v[h, j],    p = softmax over j of cap(scale q[h, g] . k[h, j])

with cap(x) = softcap tanh(x / softcap), or x. The softmax is online, in blocks (Milakov &
Gimelshein 2018; the same idea as FlashAttention's); the next block's scores are computed while a
block's values are summed. The definition is `engine.attention.attend_token_torch`.
"""

from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kvstore.rows import Raw, RowLayout
from native.library import function, library

SOURCE = Path(__file__).with_suffix(".c")
LANES = 16  # of the widest registers
DTYPES = (torch.bfloat16, torch.float32)
PART = 1024  # keys at least, where a head's keys are cut for more threads than heads
ARGUMENTS = [*[c_void_p] * 4, *[c_long] * 4, *[c_int] * 3, *[c_float] * 2]
ARGUMENTS += [*[c_int] * 4, *[c_void_p] * 3]


class Partial(NamedTuple):
    """Attention over a part of the context, and what it takes to merge it with other parts."""

    out: Float[Tensor, "Hq D"]
    lse: Float[Tensor, " Hq"]  # logarithm of the sum of exp(score); fp32


class RowPlace(NamedTuple):
    """Where in a row of a pool a key and a value stand, as numbers that need no decoding."""

    dtype: torch.dtype
    k_at: int  # bytes
    v_at: int


def row_place(layout: RowLayout) -> RowPlace | None:
    """None where rows hold no keys, or anything that must be decoded."""
    k, v = layout.k, layout.v
    if isinstance(k, Raw) and isinstance(v, Raw) and k.dtype == v.dtype:
        return RowPlace(k.dtype, layout.k_at, layout.v_at)
    return None


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_token_native` can take these tensors on this machine."""
    return (
        k.dtype == v.dtype
        and all(x.stride()[1:] == (x.shape[-1], 1) for x in (k, v))
        and can_attend(k.dtype, k.shape[-1], k.device)
    )


def can_attend(dtype: torch.dtype, dim: int, device: torch.device) -> bool:
    """Whether keys and values of this kind can be attended to by compiled code."""
    known = device.type == "cpu" and dtype in DTYPES and dim % LANES == 0
    return known and library(SOURCE) is not None


def attend_token_native(
    q: Float[Tensor, "Hq D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attention of the newest of S tokens, in compiled code; sums in fp32."""
    strides = k.stride(0) * k.itemsize, v.stride(0) * v.itemsize, k.shape[-1] * k.itemsize
    size, factors = k.shape[:2], (scale, softcap or 0.0)
    return _attend(q, k.data_ptr(), v.data_ptr(), None, strides, size, k.dtype, factors)


def attend_rows_native(
    q: Float[Tensor, "Hq D"],
    rows: UInt8[Tensor, "N bytes"],
    chosen: Int[Tensor, "Hk K"],
    place: RowPlace,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attention over chosen rows of a pool, where they lie; nothing is copied.

    Args:
        rows: each with a key and a value at these places.
        chosen: int64, contiguous: numbers of rows, for each KV head its own.
    """
    strides, at = (0, 0, rows.stride(0)), rows.data_ptr()
    k, v = at + place.k_at, at + place.v_at
    return _attend(q, k, v, chosen, strides, chosen.shape, place.dtype, (scale, softcap or 0.0))


def _attend(
    q: Tensor,
    k: int,
    v: int,
    chosen: Tensor | None,
    strides: tuple[int, int, int],
    size: tuple[int, ...],
    dtype: torch.dtype,
    factors: tuple[float, float],
) -> Partial:
    (hk, n), (hq, d) = size, q.shape
    threads = torch.get_num_threads()
    parts = max(1, min(n // PART, -(-2 * threads // hk)))
    query = (q if q.dtype in DTYPES else q.float()).contiguous()
    out, lse = torch.empty_like(query), torch.empty(hq)
    work = torch.empty(hq * (2 * d + parts * (d + 2)))
    attend = function(SOURCE, "attend_token", ARGUMENTS)
    attend(
        *(query.data_ptr(), k, v, None if chosen is None else chosen.data_ptr()),
        *(*strides, n, hk, hq // hk, d, *factors),
        *(dtype == torch.bfloat16, query.dtype == torch.bfloat16, parts, threads),
        *(work.data_ptr(), out.data_ptr(), lse.data_ptr()),
    )
    return Partial(out.to(q.dtype), lse)
