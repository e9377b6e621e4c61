"""Scores of units that are each known by one row: means, bounds, or the keys themselves.

    raw[b, h, u] = sum over e of query[b, h, e] * rows[b, h // G, u, e]        in fp32

with the softmax's statistics of every part of units in the same pass. Landmarks are rows of E = D,
page bounds of E = 2 D under the query [max(q, 0), min(q, 0)], and exact keys have a row per token.

    rows [B, Hk, U, E]   read once for the G query heads of its KV head     query [B, Hk * G, E]

Products and sums are fp32 on the cores, not on tensor cores, whose fp32 is rounded to tf32: for
each 2 bytes of a row there are G multiply-adds, and up to G = 8 reading should take longer on a
Hopper GPU. A program takes 16 KiB of rows, all asked for before the first is used: at 128k tokens
and 8 KV heads, landmarks of 8 tokens are 2,048 programs, 15 for each of 132 processors. Eight
threads share a row, 16 bytes each at a time, a whole 128-byte line: a thread adds up what it has
of all lines before threads exchange anything.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn import functional as F

from native.gpu import Build, on_gpu
from retrieval.kernels.scores import Scores, scored

PROGRAM_BYTES = 1 << 14  # of rows
LINE_BYTES = 128
THREAD_BYTES = 16
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def score_rows(
    rows: Float[Tensor, "B Hk U E"],
    query: Float32[Tensor, "B Hq E"],
    units: Int32[Tensor, " B"],
    scale: float,
    *,
    skipped: Bool[Tensor, "B Hk U"] | None = None,
) -> Scores:
    """query · row of the first `units[b]` rows; what is behind them does not matter.

    Args:
        rows: contiguous.
        scale: factor on scores in the statistics.
        skipped: units that score -inf and have no share in the softmax.
    Raises:
        ValueError: if rows are not contiguous.
    """
    if on_gpu(rows, query, units, skipped):
        return score_rows_triton(rows, query, units, scale, skipped=skipped)
    return score_rows_torch(rows, query, units, scale, skipped=skipped)


def score_rows_torch(
    rows: Float[Tensor, "B Hk U E"],
    query: Float32[Tensor, "B Hq E"],
    units: Int32[Tensor, " B"],
    scale: float,
    *,
    skipped: Bool[Tensor, "B Hk U"] | None = None,
) -> Scores:
    """The definition."""
    heads, capacity, width = rows.shape[1:]
    taken = (torch.arange(capacity, device=rows.device) < units[:, None])[:, None]
    if skipped is not None:
        taken = taken & ~skipped
    products = query.unflatten(1, (heads, -1)) @ rows.float().mT  # [B, Hk, G, U]
    raw = products.where(taken[:, :, None], -torch.inf).flatten(1, 2)
    return in_parts(raw, scale, part_units(width, rows.dtype))


def in_parts(raw: Float32[Tensor, "B Hq U"], scale: float, part: int) -> Scores:
    """Scores with their statistics, where the last part may be a partial one."""
    padded = F.pad(raw, (0, -raw.shape[-1] % part), value=-torch.inf)
    return scored(padded, scale, part)._replace(raw=raw)


def part_units(width: int, dtype: torch.dtype) -> int:
    """Rows that one program scores: a power of two, 16 to 128."""
    fit = PROGRAM_BYTES // (width * dtype.itemsize)
    return max(16, min(128, 1 << max(0, fit.bit_length() - 1)))


def score_rows_triton(
    rows: Float[Tensor, "B Hk U E"],
    query: Float32[Tensor, "B Hq E"],
    units: Int32[Tensor, " B"],
    scale: float,
    *,
    skipped: Bool[Tensor, "B Hk U"] | None = None,
) -> Scores:
    """By the kernel."""
    if not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous, got strides {rows.stride()}")
    (slots, heads, capacity, width), query_heads = rows.shape, query.shape[1]
    constants = _constants(heads, query_heads // heads, width, rows.dtype)
    parts = -(-capacity // constants["BLOCK"])
    raw = query.new_empty(slots, query_heads, capacity)
    top, total = query.new_empty(2, slots, query_heads, parts)
    skipped = None if skipped is None else skipped.contiguous().view(torch.uint8)
    _score_rows[(parts, slots * heads)](
        *(rows, query.contiguous(), units, skipped, raw, top, total, capacity, scale), **constants
    )
    return Scores(raw, top, total)


def _constants(heads: int, group: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "HEADS": heads,
        "G": group,
        "E": width,
        "BLOCK": part_units(width, dtype),
        "COLUMNS": triton.next_power_of_2(group),
        "LINE": LINE_BYTES // dtype.itemsize,
        "VECTOR": THREAD_BYTES // dtype.itemsize,
    }


@triton.jit
@no_type_check
def _score_rows(
    rows, query, units, skipped, raw, top, total, capacity, scale,
    HEADS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, LINE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One part of the units of one KV head of one slot."""
    head = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.minimum(tl.load(units + head // HEADS), capacity)
    exists = unit < count
    if tl.program_id(0) * BLOCK < count:
        rows += head * capacity * E
        query += head * G * E
        scores = _products(rows, query, unit, exists, G, E, BLOCK, COLUMNS, LINE, VECTOR)
        if skipped is not None:
            exists &= tl.load(skipped + head * capacity + unit, mask=exists, other=1) == 0
    else:
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
    write(scores, exists, unit, raw, top, total, capacity, scale, head * G, G, COLUMNS)


@triton.jit
@no_type_check
def _products(
    rows, query, unit, exists,
    G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, LINE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """query · row as [BLOCK, COLUMNS]; 0 in columns behind the G query heads."""
    sums = (tl.zeros([BLOCK, LINE // VECTOR], tl.float32),) * G
    for start in tl.static_range(0, E, LINE):
        column = start + tl.arange(0, LINE)
        inside = column < E
        places = unit[:, None] * E + column[None, :]
        line = tl.load(rows + places, mask=exists[:, None] & inside[None, :], other=0.0)
        line = line.to(tl.float32)
        added = ()
        for g in tl.static_range(G):
            terms = line * tl.load(query + g * E + column, mask=inside, other=0.0)[None, :]
            own = tl.sum(tl.reshape(terms, [BLOCK, LINE // VECTOR, VECTOR]), 2)
            added = added + (sums[g] + own,)  # noqa: RUF005
        sums = added
    found = ()
    for g in tl.static_range(COLUMNS):
        own = tl.sum(sums[g], 1) if g < G else tl.zeros([BLOCK], tl.float32)
        found = found + (own,)  # noqa: RUF005
    for level in tl.static_range(COLUMNS.bit_length() - 1):  # halves joined, within each thread
        joined = ()
        for g in tl.static_range(COLUMNS >> (level + 1)):
            pair = tl.join(found[g], found[g + (COLUMNS >> (level + 1))])
            joined = joined + (tl.reshape(pair, [BLOCK, 2 << level]),)  # noqa: RUF005
        found = joined
    return tl.reshape(found[0], [BLOCK, COLUMNS])


@triton.jit
@no_type_check
def write(
    scores, exists, unit, raw, top, total, capacity, scale, first,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK, COLUMNS] of `COUNT` query heads from `first` on, and their statistics."""
    column = tl.arange(0, COLUMNS)
    inside = column < COUNT
    scores = tl.where(exists[:, None], scores, float("-inf"))
    places = (first + column)[None, :] * capacity + unit[:, None]
    tl.store(raw + places, scores, mask=inside[None, :] & (unit < capacity)[:, None])
    logs = tl.where(exists[:, None], scores * scale, float("-inf"))
    most = tl.max(logs, 0)
    below = logs - tl.where(most == float("-inf"), 0.0, most)[None, :]
    place = (first + column) * tl.num_programs(0) + tl.program_id(0)
    tl.store(top + place, most, mask=inside)
    tl.store(total + place, tl.sum(tl.exp(below), 0), mask=inside)


def _build(
    name: str, dtype: torch.dtype, group: int, width: int, *, skipped: bool = False
) -> Build:
    constants = {**_constants(8, group, width, dtype), **({} if skipped else {"skipped": None})}
    signature = {
        "rows": POINTERS[dtype],
        "query": "*fp32",
        "units": "*i32",
        "skipped": "*u8",
        **dict.fromkeys(("raw", "top", "total"), "*fp32"),
        "capacity": "i32",
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    return Build(f"score_rows, {name}", _score_rows, signature, constants)


AOT = [
    _build("landmarks, G=4, D=128", torch.bfloat16, 4, 128, skipped=True),
    _build("bounds, G=4, D=128", torch.bfloat16, 4, 256),
    _build("bounds, G=8, D=128", torch.bfloat16, 8, 256),
    _build("keys, G=1, D=64, fp16", torch.float16, 1, 64),
    _build("keys, G=3, D=80", torch.bfloat16, 3, 80),
    _build("bounds, G=4, D=128, fp32", torch.float32, 4, 256),
]
