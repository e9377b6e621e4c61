"""Scores of packed 4-bit codes, on a batch, each byte of code read once for a group of queries.

    sum[b, h, t] = sum over m of byte[b, h, m, code[b, h // G, t, m]]             exact integers
    raw[b, h, t] = (sum * step[b, h] + bias[b, h]) * scales[b, h // G, t] + offset[b, h]

Codes lie in blocks of 32 tokens (`retrieval.codes`):

    packed[b, h, block, m, i] = code of token i | code of token i + 16 << 4     M * 16 bytes a block

A word of a table holds a byte of L = 4 query heads in 16 bits each, so that a lookup is one gather
of 8 bytes and adding up is one 64-bit addition for four heads: M * 255 < 2^16 holds to M = 257.

One program per request, KV head, run of 16 blocks and 8 query heads. Codes of 8 sub-spaces, which
are a line of 128 bytes of every block, are read 16 bytes a thread, those of the next 8 before these
are looked up, and go through shared memory: then a thread has 4 of the 16 bytes of its block in all
sub-spaces, and in a gather all threads of a warp look into the table of one sub-space, a line of
128 bytes. As they are read, they would look into 16 lines. 128k tokens of 8 KV heads are 2,048
programs of 2 warps, 15 for each of 132 processors. Lookups may bound this more than memory does: 64
codes are 32 bytes of memory a token, and 512 of L1 for 4 query heads.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float16, Int32, UInt8
from torch import Tensor

from native.gpu import Build, on_gpu
from retrieval.codes import BLOCK
from retrieval.kernels.scan import SUBSPACES
from retrieval.kernels.scores import Scores, scored
from retrieval.kernels.tables import Tables, lanes

BLOCKS = 16  # that one program scores
MOST = 8  # sub-spaces of which codes are held at once
WARPS = 2


def score_codes(
    packed: UInt8[Tensor, "B Hk N M 16"],
    scales: Float16[Tensor, "B Hk T"] | None,
    tables: Tables,
    lengths: Int32[Tensor, " B"],
    scale: float,
) -> Scores:
    """Scores of tokens [0, lengths[b]); their unit is a token, U is N * 32.

    Args:
        packed: contiguous; blocks behind a length are not read.
        scales: of every token, T = N * 32, contiguous; not read behind a length.
        scale: factor on scores in the statistics.
    Raises:
        ValueError: if there are more than 257 codes a token, or codes are not contiguous.
    """
    if on_gpu(packed, scales, *tables, lengths):
        return score_codes_triton(packed, scales, tables, lengths, scale)
    return score_codes_torch(packed, scales, tables, lengths, scale)


def score_codes_torch(
    packed: UInt8[Tensor, "B Hk N M 16"],
    scales: Float16[Tensor, "B Hk T"] | None,
    tables: Tables,
    lengths: Int32[Tensor, " B"],
    scale: float,
) -> Scores:
    """The definition."""
    _check(packed, scales)
    heads, group = packed.shape[1], tables.step.shape[1] // packed.shape[1]
    sums = _summed(packed, tables, group).float()  # [B, Hk, G, U]
    step, bias = (x.unflatten(1, (heads, group))[..., None] for x in (tables.step, tables.bias))
    raw = sums * step + bias
    if scales is not None:
        raw = raw * scales[:, :, None].float()
    if tables.offset is not None:
        raw = raw + tables.offset.unflatten(1, (heads, group))[..., None]
    taken = torch.arange(raw.shape[-1], device=raw.device) < lengths[:, None, None, None]
    return scored(raw.where(taken, -torch.inf).flatten(1, 2), scale, BLOCKS * BLOCK)


def _summed(
    packed: UInt8[Tensor, "B Hk N M 16"], tables: Tables, group: int
) -> Int32[Tensor, "B Hk G U"]:
    """Of the bytes of every token's codes."""
    values = tables.words.permute(0, 1, 2, 5, 3, 4).flatten(2, 3)[:, :, :group].int()
    codes = torch.cat([packed & 15, packed >> 4], -1).transpose(2, 3).flatten(3)  # [B, Hk, M, U]
    sums = values.new_zeros(*values.shape[:3], codes.shape[-1])
    for m in range(packed.shape[3]):  # all at once would take M times the memory
        places = codes[:, :, None, m].long().expand_as(sums)
        sums += values[:, :, :, m].gather(-1, places)
    return sums


def score_codes_triton(
    packed: UInt8[Tensor, "B Hk N M 16"],
    scales: Float16[Tensor, "B Hk T"] | None,
    tables: Tables,
    lengths: Int32[Tensor, " B"],
    scale: float,
) -> Scores:
    """The same by the kernel."""
    _check(packed, scales)
    slots, heads, blocks, codes, _ = packed.shape
    queries = tables.step.shape[1]
    parts = -(-blocks // BLOCKS)
    raw = tables.step.new_empty(slots, queries, blocks * BLOCK)
    top, total = tables.step.new_empty(2, slots, queries, parts)
    constants = _constants(heads, queries // heads, codes)
    turns = triton.cdiv(constants["WORDS"], constants["TURN"])
    _score_codes[(parts, slots * heads, turns)](
        packed.view(torch.int32),
        scales,
        tables.words.view(-1).view(torch.uint8),
        tables.step,
        tables.bias,
        tables.offset,
        lengths,
        raw,
        top,
        total,
        blocks,
        scale,
        **constants,
        num_warps=WARPS,
    )
    return Scores(raw, top, total)


def _check(packed: Tensor, scales: Tensor | None) -> None:
    if packed.shape[3] > SUBSPACES:
        raise ValueError(f"at most {SUBSPACES} codes a token, got {packed.shape[3]}")
    if not packed.is_contiguous() or not (scales is None or scales.is_contiguous()):
        raise ValueError("codes and scales must be contiguous")


def _constants(heads: int, group: int, codes: int) -> dict[str, int]:
    words, width = lanes(group)
    return {
        "HEADS": heads,
        "G": group,
        "M": codes,
        "LANES": width,
        "WORDS": words,
        "TURN": min(2, words),  # words of one program: more would not fit registers
        "STEP": next(n for n in (MOST, 4, 2, 1) if codes % n == 0),
        "BLOCKS": BLOCKS,
    }


@triton.jit
@no_type_check
def _score_codes(
    packed, scales, words, step, bias, offset, lengths, raw, top, total, blocks, scale,
    HEADS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr,
    WORDS: tl.constexpr, TURN: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    capacity = blocks * 32
    length = tl.minimum(tl.load(lengths + head // HEADS), capacity)
    token = tl.max_contiguous(part * BLOCKS * 32 + tl.arange(0, BLOCKS * 32), 4)  # as of fp32
    taken = (token < length)[None, :]
    word = tl.program_id(2) * TURN + tl.arange(0, TURN)
    raw += head * G * capacity + token[None, :]
    top += head * G * tl.num_programs(0) + part
    total += head * G * tl.num_programs(0) + part
    if part * BLOCKS * 32 >= length:
        absent = tl.full((TURN, BLOCKS * 32), float("-inf"), tl.float32)
        for lane in tl.static_range(LANES):
            g = word * LANES + lane
            _put(absent, taken, g, token, raw, top, total, capacity, scale, G)
        return
    packed += head * blocks * M * 4
    words += (head * WORDS + tl.minimum(word, WORDS - 1)) * (M * 32 * LANES)
    sums = _sums(packed, words, part, length, M, LANES, TURN, STEP, BLOCKS)
    for lane in tl.static_range(LANES):
        g = word * LANES + lane
        own = head * G + g
        found = ((sums >> (16 * lane)) & 0xFFFF).to(tl.float32)
        found *= tl.load(step + own, mask=g < G, other=0.0)[:, None]
        found += tl.load(bias + own, mask=g < G, other=0.0)[:, None]
        if scales is not None:
            factor = tl.load(scales + head * capacity + token[None, :], mask=taken, other=0.0)
            found *= factor.to(tl.float32)
        if offset is not None:
            found += tl.load(offset + own, mask=g < G, other=0.0)[:, None]
        _put(found, taken, g, token, raw, top, total, capacity, scale, G)


@triton.jit
@no_type_check
def _put(found, taken, g, token, raw, top, total, capacity, scale, G: tl.constexpr):
    """Scores of query heads g, and their statistics; -inf for tokens that are not taken."""
    found = tl.where(taken, found, float("-inf"))
    logs = tl.where(taken, found * scale, float("-inf"))
    most = tl.max(logs, 1)
    below = logs - tl.where(most == float("-inf"), 0.0, most)[:, None]
    inside = (token < capacity)[None, :] & (g < G)[:, None]
    tl.store(raw + g[:, None] * capacity, found, mask=inside)
    tl.store(top + g * tl.num_programs(0), most, mask=g < G)
    tl.store(total + g * tl.num_programs(0), tl.sum(tl.exp(below), 1), mask=g < G)


@triton.jit
@no_type_check
def _sums(
    packed, words, part, length,
    M: tl.constexpr, LANES: tl.constexpr, TURN: tl.constexpr, STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sums of table words [TURN, BLOCKS * 32], in the order of tokens."""
    quarter = tl.arange(0, BLOCKS * 4)  # 4 bytes of a block, 8 codes of each sub-space
    block = part * BLOCKS + quarter // 4
    live = (block * 32 < length)[None, :]
    m = tl.arange(0, STEP)
    nibble = tl.arange(0, 8)[:, None, None, None] * 4
    packed += (block * (M * 4) + quarter % 4)[None, :] + m[:, None] * 4
    words = words[None, :, None, None] + m[None, None, :, None] * (32 * LANES)
    kind: tl.constexpr = tl.int64 if LANES == 4 else tl.int32
    sums = tl.zeros((8, TURN, BLOCKS * 4), kind)
    codes = tl.load(packed, mask=live, other=0)  # [STEP, quarters]
    for start in range(0, M, STEP):
        ahead = tl.load(packed + (start + STEP) * 4, mask=live & (start + STEP < M), other=0)
        code = (codes.to(tl.uint32, bitcast=True)[None, None, :, :] >> nibble) & 15
        at = (words + start * (32 * LANES)) + code * (2 * LANES)
        # in one dimension, so that threads lie along quarters, however Triton would order four
        flat = tl.reshape(at, (8 * TURN * STEP * BLOCKS * 4,)).to(
            tl.pointer_type(kind), bitcast=True
        )
        sums += tl.sum(tl.reshape(tl.load(flat), (8, TURN, STEP, BLOCKS * 4)), 2)
        codes = ahead
    # nibble 2 k + h of quarter q is token 16 h + 4 q + k
    sums = tl.reshape(sums, (4, 2, TURN, BLOCKS, 4))
    return tl.reshape(tl.permute(sums, (2, 3, 1, 4, 0)), (TURN, BLOCKS * 32))


def _build(codes: int, group: int, *, scaled: bool = True, offset: bool = True) -> Build:
    lacking = {
        **({} if scaled else {"scales": None}),
        **({} if offset else {"offset": None}),
    }
    constants = _constants(8, group, codes) | lacking
    pointers = {
        "packed": "*i32", "scales": "*fp16", "words": "*u8",
        **dict.fromkeys(("step", "bias", "offset"), "*fp32"), "lengths": "*i32",
        **dict.fromkeys(("raw", "top", "total"), "*fp32"), "blocks": "i32", "scale": "fp32",
    }  # fmt: skip
    signature = pointers | dict.fromkeys(constants, "constexpr")
    name = f"score_codes, {codes} codes, G={group}{'' if scaled else ', no scales'}"
    return Build(name, _score_codes, signature, constants, num_warps=WARPS)


AOT = [
    _build(64, 4),
    _build(64, 1),
    _build(64, 2),
    _build(64, 8),
    _build(128, 4),
    _build(40, 3),
    _build(16, 4, scaled=False, offset=False),
]
