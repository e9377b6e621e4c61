"""Attention of tokens scattered over a prompt, each over exactly its own past.

    out[h, i] = sum over j of p[j] v[j],   p = softmax over j of cap(scale q[h, i] . k[j])

with j from max(0, position[i] - window + 1) to position[i]; cap(x) = softcap tanh(x / softcap), or
x. Queries stand at ascending positions, in runs of neighbours; whoever a query's neighbours are, it
sees no future.

    q [Hq, n, D]    k, v [Hk, S, D]: any strides between rows, numbers of a row side by side

The G queries of a token and KV head are rows of one matrix, token by token: a tile of its rows has
few positions, and reads each key once for all of them. Keys that no row of the tile sees are not
read, those that all rows see need no mask (FlashAttention-2, Dao 2023). Nothing is kept of scores.
"""

from math import gcd
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from engine.kernels.attend_slots import POINTERS, cap, sizes
from engine.kernels.merge_parts import LOG2E, softmax_step
from native.gpu import Build, on_gpu
from retrieval.capped import capped

# 128 rows x 128 numbers of sums are 64 registers of each of 256 threads: two warpgroups, each of
# them 64 rows, as Hopper's matrix instruction takes them. fp32 has no such instruction, and each
# thread then holds much of what it multiplies.
ROWS, KEYS, WARPS = 128, 64, 8
WIDE_ROWS, WIDE_KEYS = 16, 32
SPILLS = "tiles fit Hopper's registers: sm_80 keeps its operands in them too; 256 numbers fill them"


def attend_runs(
    q: Float[Tensor, "Hq n D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    positions: Int[Tensor, " n"],
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "Hq n D"]:
    """Attention of queries at these positions over a prompt's keys, all rotated.

    Args:
        positions: ascending, below S; what is behind the last of them is not read.
        window: tokens a query sees, itself among them; None for all of its past.
    """
    if on_gpu(q, k, v, positions):
        return attend_runs_triton(q, k, v, positions, scale, softcap, window)
    return attend_runs_torch(q, k, v, positions, scale, softcap, window)


def attend_runs_torch(
    q: Float[Tensor, "Hq n D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    positions: Int[Tensor, " n"],
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "Hq n D"]:
    """The definition, with all scores at once; `engine.blend.runs.Runs` is what a CPU runs."""
    i, j = positions[:, None], torch.arange(k.shape[1], device=k.device)
    hidden = j > i if window is None else (j > i) | (j <= i - window)
    behind = (j > positions.max())[:, None]
    wide_k, wide_v = (x.float().masked_fill(behind, 0)[:, None] for x in (k, v))
    scores = q.unflatten(0, (len(k), -1)).float() @ wide_k.mT * scale
    weights = capped(scores, softcap).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ wide_v).flatten(0, 1).to(q.dtype)


def attend_runs_triton(
    q: Float[Tensor, "Hq n D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    positions: Int[Tensor, " n"],
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "Hq n D"]:
    """The same by a kernel."""
    (hq, n, dim), hk = q.shape, len(k)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((hq, n, dim), dtype=q.dtype, device=q.device)
    constants = _constants(hq // hk, dim, q.dtype, softcap, window)
    strides = [stride for tensor in (q, k, v) for stride in tensor.stride()[:2]]
    unit = gcd(16, *strides)  # so that the compiler knows which loads may be wide
    tiles = triton.cdiv(n * (hq // hk), constants["ROWS"])
    with torch.cuda.device_of(q):  # Triton launches on the thread's device, whatever it gets
        _attend_runs[(tiles, hk)](
            *(q, k, v, positions.contiguous(), out, n, scale),
            *(stride // unit for stride in strides),
            UNIT=unit,
            **constants,
            num_warps=WARPS,
            num_stages=2,
        )
    return out


def _constants(
    group: int, dim: int, dtype: torch.dtype, softcap: float | None, window: int | None
) -> dict[str, Any]:
    wide = dtype == torch.float32
    shared = sizes(group, dim, dtype)
    del shared["GP"]
    return shared | {
        "SOFTCAP": softcap,
        "WINDOW": window,
        "ROWS": WIDE_ROWS if wide else ROWS,
        "KEYS": WIDE_KEYS if wide or dim > 128 else KEYS,
    }


@triton.jit
@no_type_check
def _attend_keys(
    acc, top, total, query, position, k, v, k_row, v_row, start, stop, end, scale,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of queries over keys [start, stop), which are read only below `end`."""
    d, t = tl.arange(0, DP), tl.arange(0, KEYS)
    for at in range(start, stop, KEYS):
        there = (d < D)[None, :]
        if MASKED:
            there &= (at + t < end)[:, None]
        at_k, at_v = k + tl.cast(at, tl.int64) * k_row, v + tl.cast(at, tl.int64) * v_row
        key = tl.load(at_k + (t[:, None] * k_row + d[None, :]), mask=there, other=0.0)
        value = tl.load(at_v + (t[:, None] * v_row + d[None, :]), mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = cap(scores, SOFTCAP) * LOG2E
        if MASKED:
            past = position[:, None] - (at + t)[None, :]
            seen = past >= 0
            if WINDOW is not None:
                seen &= past < WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, top, total = softmax_step(scores, top, total)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return acc, top, total


@triton.jit
@no_type_check
def _attend_runs(
    q, k, v, positions, out, n, scale, q_head, q_row, k_head, k_row, v_head, v_row,
    UNIT: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of the rows (token, query head) of one KV head; the longest come first."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    d, row = tl.arange(0, DP), tile * ROWS + tl.arange(0, ROWS)
    token, own = row // G, (head * G + row % G).to(tl.int64)
    last = tl.minimum((tile * ROWS + ROWS - 1) // G, n - 1)
    position = tl.load(positions + tl.minimum(token, n - 1)).to(tl.int32)
    lowest = tl.load(positions + tile * ROWS // G).to(tl.int32)
    end = tl.load(positions + last).to(tl.int32) + 1
    here = (token < n)[:, None] & (d < D)[None, :]
    query = q + (own * q_head + token.to(tl.int64) * q_row)[:, None] * UNIT + d[None, :]
    query = tl.load(query, mask=here, other=0.0)
    k += head.to(tl.int64) * k_head * UNIT
    v += head.to(tl.int64) * v_head * UNIT
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    k_row *= UNIT
    v_row *= UNIT
    if WINDOW is None:  # keys [0, whole) are seen by all rows, [whole, end) by some
        whole = (lowest + 1) // KEYS * KEYS
        acc, top, total = _attend_keys(
            acc, top, total, query, position, k, v, k_row, v_row, 0, whole, end, scale,
            D, DP, PRECISION, SOFTCAP, WINDOW, KEYS, False,
        )  # fmt: skip
    else:
        whole = tl.maximum(lowest - WINDOW + 1, 0) // KEYS * KEYS
    acc, top, total = _attend_keys(
        acc, top, total, query, position, k, v, k_row, v_row, whole, end, end, scale,
        D, DP, PRECISION, SOFTCAP, WINDOW, KEYS, True,
    )  # fmt: skip
    place = out + (own * n + token)[:, None] * D + d[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)


def _build(
    dtype: torch.dtype,
    group: int,
    dim: int,
    softcap: float | None = None,
    window: int | None = None,
) -> Build:
    signature = dict.fromkeys(("q", "k", "v"), POINTERS[dtype]) | {"positions": "*i64"}
    signature |= {"out": POINTERS[dtype], "n": "i32", "scale": "fp32"}
    signature |= {f"{x}_{what}": "i32" for x in "qkv" for what in ("head", "row")}
    constants = _constants(group, dim, dtype, softcap, window) | {"UNIT": 16}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"attend_runs, {dtype}, G={group}, D={dim}, softcap {softcap}, window {window}"
    spills = None if dtype == torch.float32 else SPILLS
    return Build(name, _attend_runs, signature, constants, WARPS, 2, spills)


AOT: list[Build] = [
    _build(torch.bfloat16, 4, 128),
    _build(torch.bfloat16, 2, 256, 50.0, 4096),
    _build(torch.float16, 3, 80),
    _build(torch.float32, 4, 128),
]
