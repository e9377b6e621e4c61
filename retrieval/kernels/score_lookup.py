"""Scores of tokens from tables of what each centroid of a codebook adds.

    raw[b, h, t] = sum over m of table[b, h, m, codes[b, h // G, t, m]]        in fp32

with the softmax's statistics of every part of tokens in the same pass. Vector quantization has one
code per token (M = 1, C up to 65,536), product quantization M codes of one byte.

    codes [B, Hk, T, M] uint8, or int16 that holds 0 .. 65,535 as its bits     read once
    table [B, Hq, M, C]  ->  [B, Hk, M, C, G']    the G query heads of a KV head side by side

so that one lookup of 16 bytes serves 4 of them (G' is G rounded up to 1, 2 or a multiple of 4).
Bytes of neighbouring sub-spaces are read as one word. The lookups are the cost, not the bytes: a
table (64 KiB for M = 16, C = 256, G = 4) is held by a processor's L1, or by L2 if it is larger,
and what a warp looks up in different lines comes one after the other. They do not depend on each
other, and a program is small, 2 tokens for each of 128 threads (8 where M = 1), so that many are
under way: at 128k tokens and 8 KV heads 4,096 programs of 32 registers a thread.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int16, Int32, UInt8
from torch import Tensor
from torch.nn import functional as F

from native.gpu import Build, on_gpu
from retrieval.kernels.score_rows import in_parts, write
from retrieval.kernels.scores import Scores

PROGRAM_LOOKUPS = 1 << 12
WORD_BYTES = 4
QUAD = 4  # query heads that a thread looks up at once: 16 bytes


def score_lookup(
    codes: UInt8[Tensor, "B Hk T M"] | Int16[Tensor, "B Hk T M"],
    table: Float32[Tensor, "B Hq M C"],
    lengths: Int32[Tensor, " B"],
    scale: float,
) -> Scores:
    """Sums of table entries of the first `lengths[b]` tokens; codes behind them do not matter.

    Args:
        codes: contiguous, of entries that the table has.
        scale: factor on scores in the statistics.
    Raises:
        ValueError: if codes are not contiguous.
    """
    if on_gpu(codes, table, lengths):
        return score_lookup_triton(codes, table, lengths, scale)
    return score_lookup_torch(codes, table, lengths, scale)


def score_lookup_torch(
    codes: UInt8[Tensor, "B Hk T M"] | Int16[Tensor, "B Hk T M"],
    table: Float32[Tensor, "B Hq M C"],
    lengths: Int32[Tensor, " B"],
    scale: float,
) -> Scores:
    """The definition."""
    heads, capacity, subspaces = codes.shape[1:]
    exists = torch.arange(capacity, device=codes.device) < lengths[:, None, None]
    group = table.shape[1] // heads
    found = codes.long() & 0xFFFF  # of int16 the bits
    found = found.where(exists[..., None], 0).mT.repeat_interleave(group, 1)  # [B, Hq, M, T]
    raw = table.gather(3, found).sum(2).where(exists, -torch.inf)
    return in_parts(raw, scale, part_tokens(subspaces))


def part_tokens(subspaces: int) -> int:
    """Tokens that one program scores: a power of two, 256 to 1,024."""
    fit = PROGRAM_LOOKUPS // subspaces
    return max(256, min(1024, 1 << max(0, fit.bit_length() - 1)))


def score_lookup_triton(
    codes: UInt8[Tensor, "B Hk T M"] | Int16[Tensor, "B Hk T M"],
    table: Float32[Tensor, "B Hq M C"],
    lengths: Int32[Tensor, " B"],
    scale: float,
) -> Scores:
    """By the kernel."""
    if not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous, got strides {codes.stride()}")
    (slots, heads, capacity, subspaces), query_heads = codes.shape, table.shape[1]
    group = query_heads // heads
    constants = _constants(heads, group, subspaces, table.shape[3], codes.dtype)
    aside = table.unflatten(1, (heads, group)).movedim(2, -1)  # [B, Hk, M, C, G]
    aside = F.pad(aside, (0, constants["QUADS"] * constants["COLUMNS"] - group)).contiguous()
    parts = -(-capacity // constants["BLOCK"])
    raw = table.new_empty(slots, query_heads, capacity)
    top, total = table.new_empty(2, slots, query_heads, parts)
    words = codes.view(torch.int32) if constants["BITS"] * constants["CODES"] == 32 else codes
    _score_lookup[(parts, slots * heads)](
        *(words, aside, lengths, raw, top, total, capacity, scale), **constants
    )
    return Scores(raw, top, total)


def _constants(
    heads: int, group: int, subspaces: int, entries: int, dtype: torch.dtype
) -> dict[str, int]:
    """CODES of `BITS` bits each are read as one word, COLUMNS query heads looked up as one."""
    whole = subspaces * dtype.itemsize % WORD_BYTES == 0
    return {
        "HEADS": heads,
        "G": group,
        "M": subspaces,
        "C": entries,
        "BLOCK": part_tokens(subspaces),
        "COLUMNS": min(QUAD, triton.next_power_of_2(group)),
        "QUADS": -(-group // QUAD),
        "CODES": WORD_BYTES // dtype.itemsize if whole else 1,
        "BITS": 8 * dtype.itemsize,
    }


@triton.jit
@no_type_check
def _score_lookup(
    words, table, lengths, raw, top, total, capacity, scale,
    HEADS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, QUADS: tl.constexpr, CODES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One part of the tokens of one KV head of one slot."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.minimum(tl.load(lengths + head // HEADS), capacity)
    exists = token < count
    sums = (tl.zeros([BLOCK, COLUMNS], tl.float32),) * QUADS
    if tl.program_id(0) * BLOCK < count:
        words += head * capacity * (M // CODES)
        table += head * M * C * (QUADS * COLUMNS)
        column = tl.arange(0, COLUMNS)[None, :]
        for w in tl.static_range(M // CODES):
            place = words + token * (M // CODES) + w
            word = tl.load(place, mask=exists, other=0, eviction_policy="evict_first").to(tl.int32)
            for i in tl.static_range(CODES):
                code = (word >> (i * BITS)) & ((1 << BITS) - 1)
                entry = ((w * CODES + i) * C + code)[:, None] * (QUADS * COLUMNS) + column
                added = ()
                for quad in tl.static_range(QUADS):
                    own = tl.load(table + entry + quad * COLUMNS, mask=exists[:, None], other=0.0)
                    added = added + (sums[quad] + own,)  # noqa: RUF005
                sums = added
    for quad in tl.static_range(QUADS):
        first, here = head * G + quad * COLUMNS, min(COLUMNS, G - quad * COLUMNS)
        write(sums[quad], exists, token, raw, top, total, capacity, scale, first, here, COLUMNS)


def _build(name: str, dtype: torch.dtype, group: int, subspaces: int, entries: int) -> Build:
    constants = _constants(8, group, subspaces, entries, dtype)
    one = {torch.uint8: "*u8", torch.int16: "*i16"}[dtype]
    signature = {
        "words": one if constants["CODES"] == 1 else "*i32",
        "table": "*fp32",
        "lengths": "*i32",
        **dict.fromkeys(("raw", "top", "total"), "*fp32"),
        "capacity": "i32",
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    return Build(f"score_lookup, {name}", _score_lookup, signature, constants)


AOT = [
    _build("1 code of 4160, G=4", torch.int16, 4, 1, 4160),
    _build("1 code of 256, G=1", torch.uint8, 1, 1, 256),
    _build("16 codes of 256, G=4", torch.uint8, 4, 16, 256),
    _build("16 codes of 256, G=8", torch.uint8, 8, 16, 256),
    _build("10 codes of 256, G=3", torch.uint8, 3, 10, 256),
]
