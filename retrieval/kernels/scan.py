"""Scores of packed 4-bit codes from tables of 16, and the best tokens by them.

    score[q, t] = scale[t] * (bias[q] + step[q] * sum over m of table[q, m, code[t, m]])

with tables rounded to bytes, so that a byte shuffle looks up 16 codes or more at once, and sums
are of integers: PQ fast scan (André et al. 2015), Quicker ADC (André et al. 2019), FAISS (Douze et
al. 2024). Each byte of code is read once for all queries of its KV head. Whatever fits 16 values
to a code is scored so: 4-bit product quantization, 4 dimensions of 1 bit, 2 of 2 bits, 1 of 4.

Two Sapphire Rapids cores, 8 KV heads of 4 queries, 64 codes a token, the best 2,048 for each KV
head: 0.7 ms of 32k tokens and 2.0 of 128k, where all scores take 0.5 and 1.3 and FAISS's
IndexPQFastScan, that finds 2,048 for each query, 2.9 and 5.6. The definition takes 27 and 113 for
scores.
"""

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from native.library import library
from retrieval.codes import BLOCK, Codes, unpacked
from retrieval.select import Policy, top_tokens

SOURCE = Path(__file__).with_suffix(".c")
SUBSPACES = 257  # at most: their sum, of bytes, is kept in 16 bits
PART = 64  # blocks at least, where a head's are cut for more threads than heads
RUN = 64  # blocks looked up at once by the definition: their places stay in the cache


class Tables(NamedTuple):
    """Tables as bytes: entry = byte * step + a part of the bias."""

    values: UInt8[Tensor, "Hq M 16"]
    step: Float[Tensor, " Hq"]
    bias: Float[Tensor, " Hq"]


def quantized(table: Float[Tensor, "Hq M 16"]) -> Tables:
    """Every sub-space from its smallest entry up, in steps of one size for each query head.

    That step is the widest sub-space's range over 255. What is not finite makes `step` or `bias`
    so, and with them every score of that head.
    """
    table = table.float()
    low, high = table.amin(-1, keepdim=True), table.amax(-1, keepdim=True)  # aminmax: half as fast
    step = (high - low).amax(1, keepdim=True) / 255
    values = ((table - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    return Tables(
        values.nan_to_num_(0).clamp_(0, 255).to(torch.uint8).contiguous(),
        step.flatten(),
        low.sum((1, 2)),
    )


def scan(codes: Codes, table: Float[Tensor, "Hq M 16"]) -> Float[Tensor, "Hq T"]:
    """Scores of all tokens: in compiled code on a CPU that can, else in torch."""
    return scan_native(codes, table) if serves(codes) else scan_torch(codes, table)


def search(
    codes: Codes, table: Float[Tensor, "Hq M 16"], policy: Policy, scale: float
) -> Int[Tensor, "Hk K"]:
    """Ids of `top_tokens` of all scores, no scores kept where compiled code serves.

    Args:
        scale: factor on scores before their softmax.
    """
    if policy.top_p is None and serves(codes):
        return search_native(codes, table, policy, scale)
    scores = scan(codes, table)
    heads = len(codes.packed)
    return top_tokens(scores, policy, num_kv_heads=heads, length=codes.length, scale=scale)


def scan_torch(codes: Codes, table: Float[Tensor, "Hq M 16"]) -> Float[Tensor, "Hq T"]:
    """Scores of all tokens. The definition."""
    values, step, bias = quantized(table)
    heads, _, subspaces, _ = codes.packed.shape
    weights = values.view(heads, -1, subspaces * 16).mT.float().contiguous()  # [Hk, M * 16, G]
    offsets = torch.arange(subspaces, device=table.device) * 16
    sums = weights.new_empty(heads, weights.shape[2], codes.packed.shape[1] * BLOCK)
    for head, blocks in enumerate(codes.packed.split(1)):
        for part, out in zip(blocks.split(RUN, 1), sums[head].split(RUN * BLOCK, 1), strict=True):
            # an embedding bag adds up rows; sums of bytes are exact in fp32
            out.copy_(F.embedding_bag(unpacked(part)[0] + offsets, weights[head], mode="sum").mT)
    scores = sums.flatten(0, 1)[:, : codes.length] * step[:, None] + bias[:, None]
    if codes.scales is None:
        return scores
    return (scores.unflatten(0, (heads, -1)) * codes.scales[:, None].float()).flatten(0, 1)


def serves(codes: Codes) -> bool:
    """Whether compiled code can read these codes on this machine."""
    fits = codes.packed.device.type == "cpu" and codes.packed.shape[2] <= SUBSPACES
    return fits and library(SOURCE) is not None


def scan_native(codes: Codes, table: Float[Tensor, "Hq M 16"]) -> Float[Tensor, "Hq T"]:
    """Scores of all tokens, in compiled code."""
    code = _code()
    tables, out = quantized(table), torch.empty(len(table), codes.length, dtype=torch.float32)
    heads, threads = len(codes.packed), torch.get_num_threads()
    parts = _parts(codes, -(-4 * threads // heads))
    code.scan(*_read(codes, tables), *_ints(parts, threads), _at(out))
    return out


def search_native(
    codes: Codes, table: Float[Tensor, "Hq M 16"], policy: Policy, scale: float
) -> Int[Tensor, "Hk K"]:
    """Ids of `top_tokens`, in compiled code; takes memory for the sums of one head per thread."""
    code, (heads, blocks, *_) = _code(), codes.packed.shape
    if policy.budget >= codes.length:
        return torch.arange(codes.length).expand(heads, -1)
    values, step, bias = quantized(table)
    factor = scale * math.log2(math.e)  # powers of 2 are cheaper than of e, and order alike
    tables = Tables(values, step * factor, bias * factor)
    threads, group = torch.get_num_threads(), len(table) // heads
    even = heads % threads == 0 or heads >= 4 * threads
    parts = 1 if even else _parts(codes, threads)
    units = threads if parts == 1 else heads
    work = torch.empty(units * blocks * (16 * max(group, 4) + BLOCK), dtype=torch.int32)
    lse = torch.empty(len(table) * (parts + 1), dtype=torch.float32)
    out = torch.empty(heads, policy.budget, dtype=torch.int64)
    code.search(
        *_read(codes, tables),
        *map(ctypes.c_long, (policy.budget, policy.sinks, policy.window)),
        *_ints(policy.reduce == "sum", parts, threads),
        *map(_at, (work, lse, out)),
    )
    return out


def _parts(codes: Codes, most: int) -> int:
    """Into how many runs of blocks the codes of a head are cut."""
    return max(1, min(codes.packed.shape[1] // PART, most))


def _code() -> ctypes.CDLL:
    code = library(SOURCE)
    assert code is not None, "ask serves() first"
    return code


def _read(codes: Codes, tables: Tables) -> list[object]:
    """What both functions of the compiled code read."""
    packed, scales = codes.packed, codes.scales
    heads, _, subspaces, _ = packed.shape
    strides = packed.stride(0), 0 if scales is None else scales.stride(0)
    return [
        *map(_at, (packed, scales, tables.values, tables.step, tables.bias)),
        *map(ctypes.c_long, (codes.length, *strides)),
        *_ints(heads, len(tables.step) // heads, subspaces),
    ]


def _ints(*numbers: int) -> list[ctypes.c_int]:
    return [ctypes.c_int(number) for number in numbers]


def _at(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
