"""Attention of tokens scattered over a prompt, each seeing itself and its own past and no more."""

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from engine.attention import MASK_ELEMENTS, grouped
from engine.kernels import attend_past
from engine.model.pieces import AttentionSpec
from native.gpu import on_gpu

SPAN = 512  # positions that the queries of a group spread over: keys read in vain, on average half


class Group(NamedTuple):
    """Queries [lo, hi) of those given, over keys [first, stop)."""

    lo: int
    hi: int
    first: int
    stop: int
    mask: Float[Tensor, "n S"]  # what is added to their scores: 0 or -inf


class Runs:
    """Queries at ascending positions, in groups of near ones; masks are made once per window.

    Bottom-right causal masks, as kernels for contiguous chunks have them, would let scattered
    tokens see their future; here a query at position p sees keys 0 to p, whoever its neighbours
    are. Memory for masks is bounded: those of long prompts are made when they are needed. On a GPU,
    and on a CPU with products in bf16, there are none: a kernel compares positions.
    """

    def __init__(self, positions: Int[Tensor, " n"], dtype: torch.dtype) -> None:
        self.positions, self._dtype = positions, dtype
        at = positions.tolist()
        self._at, self._bounds = at, list(_bounds(at))
        self._kept: dict[int | None, list[Group]] = {}

    def attend(
        self,
        q: Float[Tensor, "Hq n D"],
        k: Float[Tensor, "Hk S D"],
        v: Float[Tensor, "Hk S D"],
        spec: AttentionSpec,
    ) -> Float[Tensor, "Hq n D"]:
        """Attention of queries at these positions over the prompt's keys, all rotated."""
        if on_gpu(q, k, v, self.positions):
            from engine.kernels.attend_runs import attend_runs  # needs triton: not where no GPU is

            return attend_runs(q, k, v, self.positions, spec.scale, spec.softcap, spec.window)
        if attend_past.serves(q, k, v):
            return attend_past.attend_past_native(q, k, v, self.positions, spec)
        parts = [
            _attend(q[:, g.lo : g.hi], k[:, g.first : g.stop], v[:, g.first : g.stop], spec, g.mask)
            for g in self._groups(spec.window)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _groups(self, window: int | None) -> Iterator[Group]:
        if window in self._kept:
            yield from self._kept[window]
            return
        kept, elements = [], 0
        for lo, hi in self._bounds:
            group = self._group(lo, hi, window)
            elements += group.mask.numel()
            if elements <= MASK_ELEMENTS:
                kept.append(group)
            yield group
        if elements <= MASK_ELEMENTS:
            self._kept[window] = kept

    def _group(self, lo: int, hi: int, window: int | None) -> Group:
        start, stop = self._at[lo], self._at[hi - 1] + 1
        first = 0 if window is None else max(0, start - window + 1)
        i = self.positions[lo:hi, None]
        j = torch.arange(first, stop, device=i.device)
        hidden = j > i if window is None else (j > i) | (j <= i - window)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=i.device)
        return Group(lo, hi, first, stop, mask.masked_fill_(hidden, float("-inf")))


def _bounds(at: list[int]) -> Iterator[tuple[int, int]]:
    """Groups of queries that lie within `SPAN`, and whose mask is not too large."""
    lo = 0
    while lo < len(at):
        hi = bisect_left(at, at[lo] + SPAN, lo)
        hi = min(hi, lo + max(16, MASK_ELEMENTS // (at[hi - 1] + 1)))
        yield lo, hi
        lo = hi


def _attend(
    q: Float[Tensor, "Hq n D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
    mask: Float[Tensor, "n S"],
) -> Float[Tensor, "Hq n D"]:
    """One group. Queries that share a KV head are one matrix where their mask is small enough, a
    tenth faster in bf16; else keys are expanded by stride, and every head has the same mask.
    """
    group, most = len(q) // len(k), MASK_ELEMENTS // mask.numel()  # heads of so many numbers
    if spec.softcap is None:
        if most < group:
            return grouped(q, k, v, spec, mask)
        folded, each = q.reshape(1, len(k), -1, q.shape[2]), mask.repeat(group, 1)
        out = F.scaled_dot_product_attention(
            folded, k[None], v[None], attn_mask=each, scale=spec.scale
        )
        return out.reshape(q.shape)
    step = len(q) if most >= len(q) else group if most >= group else 1
    parts = [
        grouped(q[i : i + step], k[j:stop], v[j:stop], spec, mask)
        for i in range(0, len(q), step)
        for j, stop in [(i // group, (i + step - 1) // group + 1)]
    ]
    return torch.cat(parts)
