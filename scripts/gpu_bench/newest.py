"""Trials of the kernels of new tokens alone: their norms, their rotation, their clusters."""

import torch
from torch import Tensor

from engine.batch.tail import PITCH
from engine.kernels import append_tail, norm_rows, rms_norm, rotate_rows
from gpu_bench.scoring import CHUNK
from gpu_bench.trial import ROUNDED, Sizes, Trial, size
from retrieval.estimate import CLUSTER_TOKENS
from retrieval.kernels import append_unit

EPS = 1e-5


def normed(sizes: Sizes) -> Trial:
    """Hidden states, as wide as all query heads together."""
    width = sizes.query_heads * sizes.dim
    x, weight = sizes.randn(sizes.batch, width), sizes.randn(width)
    return Trial(
        run=lambda: [norm_rows.norm_rows(x, weight, EPS)],
        define=lambda: [rms_norm.rms_norm_torch(x, weight, EPS)],
        moved=2 * x.nbytes + weight.nbytes,
        tolerance=ROUNDED[sizes.dtype],
    )


def rotated(sizes: Sizes) -> Trial:
    """Queries and keys."""
    q = sizes.randn(sizes.batch, sizes.query_heads, sizes.dim)
    k = sizes.randn(sizes.batch, sizes.heads, sizes.dim)
    angle = sizes.randn(sizes.batch, sizes.dim // 2, dtype=torch.float32)
    asked = q, k, angle.cos(), angle.sin()
    return Trial(
        run=lambda: rotate_rows.rotate_rows(*asked, interleaved=False),
        define=lambda: rotate_rows.rotate_rows_torch(*asked, interleaved=False),
        moved=size(asked) + size((q, k)),
        tolerance=ROUNDED[sizes.dtype],
    )


def summarised(sizes: Sizes) -> Trial:
    """Clusters that are half full."""
    width = 2 * sizes.dim + 1
    shape = sizes.batch, sizes.heads, sizes.tokens // CLUSTER_TOKENS, -(-width // PITCH) * PITCH
    summaries = sizes.randn(*shape, dtype=torch.float32)[..., :width]  # rows as a batch keeps them
    k, v = (sizes.randn(sizes.batch, sizes.heads, sizes.dim) for _ in range(2))
    at = sizes.full() - CLUSTER_TOKENS // 2

    def run() -> list[Tensor]:
        append_tail.append_tail(k, v, at, summaries, CLUSTER_TOKENS)
        return [summaries]

    def define() -> list[Tensor]:
        own = summaries.clone()
        append_tail.append_tail_torch(k, v, at, own, CLUSTER_TOKENS)
        return [own]

    return Trial(run, define, size((k, v)) + 2 * 4 * width * sizes.batch * sizes.heads)


def landmarked(sizes: Sizes) -> Trial:
    """Landmarks that have half of their tokens."""
    heads = sizes.batch, sizes.heads
    rows = sizes.randn(*heads, sizes.tokens // CHUNK, sizes.dim)
    waiting, keys = sizes.randn(*heads, CHUNK, sizes.dim), sizes.randn(*heads, sizes.dim)
    at = sizes.full() - CHUNK // 2

    def run() -> list[Tensor]:
        append_unit.append_unit(keys, at, waiting, rows, "mean")
        return [waiting, rows]

    def define() -> list[Tensor]:
        own = waiting.clone(), rows.clone()
        append_unit.append_unit_torch(keys, at, *own, "mean")
        return [*own]

    return Trial(run, define, 3 * keys.nbytes + waiting.nbytes // 2)
