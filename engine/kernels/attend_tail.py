"""Attention over what is selected and an estimate of all else, on a CPU, where the rows lie.

    s[j]  = scale q . k[j]                                                of a selected token
    l[c]  = (n scale q . mean_k[c] - sum of s[j], j in c) / left + min(2, scale² |q|² spread[c] / 2)
    out   ∝ sum over c of exp(l[c]) n mean_v[c] + sum over j of (exp(s[j]) - exp(l[c(j)])) v[j]

with n tokens in a cluster, `left` of them not selected. It is `retrieval.estimate.Tail.estimate`
merged with attention over the selected, but that every row and every summary is read once.
"""

from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from engine.kernels.attend_token import DTYPES, LANES, Partial, RowPlace
from native.library import function, library
from retrieval.estimate import MOST_WIDENING, Tail

SOURCE = Path(__file__).with_suffix(".c")
BLOCK, MOST = 64, 4  # as rows.h has them
PART = 16  # clusters at least, where a head's are cut for more threads than heads
ARGUMENTS = [*[c_void_p] * 6, *[c_long] * 5, *[c_int] * 4, *[c_float] * 2, *[c_int] * 4]
ARGUMENTS += [c_void_p] * 3


def can_estimate(tail: Tail, dtype: torch.dtype, dim: int) -> bool:
    """Whether compiled code can take a tail, beside rows of numbers of this type."""
    known = tail.softcap is None and tail.summaries.device.type == "cpu"
    return known and dtype in DTYPES and dim % LANES == 0 and library(SOURCE) is not None


def attend_tail_native(
    q: Float[Tensor, "Hq D"],
    tail: Tail,
    ids: Int[Tensor, "Hk K"],
    rows: UInt8[Tensor, "N bytes"],
    chosen: Int[Tensor, "Hk K"],
    place: RowPlace,
    scale: float,
) -> Partial:
    """Attention over all tokens: over the selected as they are, over the others estimated.

    Args:
        ids: int64: the selected tokens, ascending, none twice.
        rows: of a pool, with their keys and values at these places.
        chosen: int64: the numbers of their rows.
        scale: factor on q · k.
    """
    (hk, n), (hq, d) = ids.shape, q.shape
    means, threads = tail.summaries, torch.get_num_threads()
    parts = max(1, min(means.shape[1] // PART, -(-2 * threads // hk)))
    query = (q if q.dtype in DTYPES else q.float()).contiguous()
    ids, chosen = ids.contiguous(), chosen.contiguous()
    out, lse = torch.empty_like(query), torch.empty(hq)
    blocks, clusters = n // BLOCK + parts + 1, means.shape[1] + parts
    team = MOST * (BLOCK * blocks + clusters)
    work = torch.empty(hq * (2 * d + 1 + parts * (d + 2)) + hk * (hq // hk // MOST + 1) * team)
    attend = function(SOURCE, "attend_tail", ARGUMENTS)
    attend(
        *(query.data_ptr(), ids.data_ptr(), chosen.data_ptr()),
        *(rows.data_ptr() + place.k_at, rows.data_ptr() + place.v_at, means.data_ptr()),
        *(rows.stride(0), n, tail.length, means.stride(0), means.stride(1)),
        *(tail.cluster_tokens, hk, hq // hk, d, scale, MOST_WIDENING),
        *(place.dtype == torch.bfloat16, query.dtype == torch.bfloat16, parts, threads),
        *(work.data_ptr(), out.data_ptr(), lse.data_ptr()),
    )
    return Partial(out.to(q.dtype), lse)
