"""Attention of tokens of a prompt on a CPU with products of pairs in bf16, each over its own past.

    out[h, i] = sum over j of p[j] v[j],   p = softmax over j of cap(scale q[h, i] . k[j])

with j from max(0, position[i] - window + 1) to position[i]; cap(x) = softcap tanh(x / softcap), or
x. Positions ascend: a chunk of a prompt, or tokens scattered over it. The definition is
`engine.kernels.attend_runs.attend_runs_torch`.

Keys are taken in blocks of 64, packed once for some hundred queries, and the softmax is online
(FlashAttention, Dao et al. 2022); weights are rounded to bf16, all sums are in fp32. Torch's own
attention multiplies in fp32 unless a processor has matrix instructions (AMX); a whole prefill is
measured beside it by `scripts/bench_prefill.py`.
"""

from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.model.pieces import AttentionSpec
from native.library import function, library, value

SOURCE = Path(__file__).with_suffix(".c")
LANES, BLOCK = 16, 64  # numbers of a register; keys that are packed at once
MOST_ROWS = 512  # queries of all heads of a task: their sums stay in a core's own cache
LEAST_ROWS = 128  # fewer are not worth to pack keys for
TASKS = 4  # for each thread, if there are so many
ARGUMENTS = [
    *[c_void_p] * 4, *[c_long] * 7, *[c_int] * 3, *[c_float] * 2, c_long, c_long, c_int, c_long,
    *[c_void_p] * 2,
]  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_past_native` can take these tensors on this machine, and gains by it."""
    return can_attend(q, k, v) and value(SOURCE, "has_pair_products") == 1


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_past_native` can take these tensors on this machine."""
    return (
        all(x.is_cpu and x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q, k, v))
        and q.shape[-1] % LANES == 0
        and library(SOURCE) is not None
        and value(SOURCE, "has_pair_products") > 0
    )


def attend_past_native(
    q: Float[Tensor, "Hq n D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    positions: Int[Tensor, " n"],
    spec: AttentionSpec,
) -> Float[Tensor, "Hq n D"]:
    """Attention of queries at these positions over a prompt's keys, all rotated.

    Args:
        positions: ascending, below S; what is behind the last of them is not read.
    """
    (hq, n, dim), hk, threads = q.shape, len(k), torch.get_num_threads()
    group, at = hq // hk, positions.long().contiguous()
    each = _queries_of_a_task(n, group, hk, threads)
    size = BLOCK * dim + each * group * (dim + LANES + 1)
    work, out = torch.empty(threads * size), torch.empty((hq, n, dim), dtype=q.dtype)
    attend = function(SOURCE, "attend_past", ARGUMENTS)
    attend(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), at.data_ptr()),
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        *(n, hk, group, dim, spec.scale, spec.softcap or 0.0, spec.window or 0),
        *(each, threads, size, work.data_ptr(), out.data_ptr()),
    )
    return out


def _queries_of_a_task(n: int, group: int, heads: int, threads: int) -> int:
    """As many as share packed keys, so that threads have some tasks each."""
    parts = min(-(-TASKS * threads // heads), -(-n * group // LEAST_ROWS))
    parts = max(1, parts, -(-n * group // MOST_ROWS))
    return max(1, -(-n // parts))
