"""Trials of the kernels that attend: to chosen rows, to parts, from scattered tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.batch.tail import PITCH
from engine.kernels import attend_runs, attend_slots, attend_whole, merge_parts, tail
from gpu_bench.choosing import HOT
from gpu_bench.rows import finite, layout_of, some
from gpu_bench.trial import ROUNDED, Sizes, Trial, size
from retrieval.estimate import CLUSTER_TOKENS

REPAIRED = 0.15  # of the tokens of a blend
PROMPT = 20_480  # tokens of ten chunks


def chosen(sizes: Sizes) -> Trial:
    """A budget of rows of the hot buffer for each KV head."""
    layout, slots = layout_of(sizes), round(HOT * sizes.budget) + 16
    q = sizes.randn(sizes.batch, sizes.query_heads, sizes.dim)
    hot = finite(sizes, sizes.batch, sizes.heads, slots, layout.row_bytes)
    asked = q, hot, some(sizes, slots), layout, sizes.dim**-0.5
    return Trial(
        run=lambda: attend_slots.attend_slots(*asked),
        define=lambda: attend_slots.attend_slots_torch(*asked),
        moved=asked[2].numel() * layout.row_bytes + 2 * size([q]),
        tolerance=ROUNDED[sizes.dtype],
        beside={"index and SDPA": lambda: _indexed(sizes, q, hot, asked[2])},
    )


def _indexed(sizes: Sizes, q: Tensor, hot: Tensor, slots: Tensor) -> Tensor:
    """What torch has: rows copied side by side, then its fused attention."""
    rows = hot.view(sizes.dtype)
    at = slots.long()[..., None].expand(-1, -1, -1, rows.shape[3])
    k, v = rows.gather(2, at)[..., : 2 * sizes.dim].split(sizes.dim, -1)
    folded = q.unflatten(1, (sizes.heads, -1))
    return F.scaled_dot_product_attention(folded, k, v, scale=sizes.dim**-0.5)


def merged(sizes: Sizes) -> Trial:
    """Parts of one attention."""
    outs = sizes.randn(16, sizes.batch, sizes.query_heads, sizes.dim, dtype=torch.float32)
    lses = sizes.randn(16, sizes.batch, sizes.query_heads, dtype=torch.float32)
    return Trial(
        run=lambda: merge_parts.merge_parts(outs, lses),
        define=lambda: merge_parts.merge_parts_torch(outs, lses),
        moved=size((outs, lses)) + outs[0].nbytes,
    )


def estimated(sizes: Sizes) -> Trial:
    """The tail of what is not selected, by clusters."""
    asked, moved = _tail(sizes)
    return Trial(
        run=lambda: tail.estimate_tail(*asked),
        define=lambda: tail.estimate_tail_torch(*asked),
        moved=moved,
        tolerance=ROUNDED[sizes.dtype],
    )


def whole(sizes: Sizes) -> Trial:
    """What is selected, and the tail; each selected row is read for both."""
    asked, moved = _tail(sizes)
    return Trial(
        run=lambda: attend_whole.attend_whole(*asked),
        define=lambda: attend_whole.attend_whole_torch(*asked),
        moved=moved,
        tolerance=ROUNDED[sizes.dtype],
    )


def _tail(sizes: Sizes) -> tuple[tuple[Any, ...], int]:
    """What an estimate takes, and the bytes that it moves."""
    layout, slots = layout_of(sizes), round(HOT * sizes.budget) + 16
    q = sizes.randn(sizes.batch, sizes.query_heads, sizes.dim)
    width = 2 * sizes.dim + 1
    pitch = -(-width // PITCH) * PITCH  # as a batch keeps them
    shape = sizes.batch, sizes.heads, sizes.tokens // CLUSTER_TOKENS, pitch
    summaries = sizes.randn(*shape, dtype=torch.float32).mul_(0.3)[..., :width]
    summaries[..., -1].abs_()  # a variance
    hot = finite(sizes, sizes.batch, sizes.heads, slots, layout.row_bytes)
    ids, at = some(sizes, sizes.tokens), some(sizes, slots)
    asked = q, summaries, sizes.full(), ids, hot, at, layout, CLUSTER_TOKENS, sizes.dim**-0.5
    return asked, summaries.nbytes + ids.numel() * (layout.row_bytes + 8) + 2 * q.nbytes


def scattered(sizes: Sizes) -> Trial:
    """The tokens of one blended prompt that are computed afresh; a blend has no batch."""
    tokens = min(sizes.tokens, PROMPT)
    blocks = torch.rand(tokens // 16, device=sizes.device).argsort()
    picked = blocks[: max(1, round(REPAIRED * len(blocks)))].sort().values
    at = (picked[:, None] * 16 + torch.arange(16, device=sizes.device)).flatten()
    q = sizes.randn(sizes.query_heads, len(at), sizes.dim)
    k, v = (sizes.randn(sizes.heads, tokens, sizes.dim) for _ in range(2))
    scale = sizes.dim**-0.5
    seen = torch.arange(tokens, device=sizes.device) <= at[:, None]
    return Trial(
        run=lambda: [attend_runs.attend_runs(q, k, v, at, scale)],
        define=lambda: [attend_runs.attend_runs_torch(q, k, v, at, scale)],
        moved=size((q, k, v)) + q.nbytes,
        flops=4 * sizes.dim * sizes.query_heads * int(at.sum() + len(at)),
        tolerance=ROUNDED[sizes.dtype],
        beside={
            "SDPA with a mask": lambda: F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=True
            )
        },
    )
