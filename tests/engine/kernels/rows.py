"""Hot buffers as kernels find them: rows of some tokens in random slots, the rest not a number."""

import torch
from torch import Tensor

from kvstore.rows import Raw, RowLayout

HEADS = [(2, 2), (3, 1), (4, 1), (8, 1)]  # groups of 1, 3, 4 and 8
DTYPES = [torch.float32, torch.float16]  # the interpreter's dot in bf16 is wrong


def layout_of(dim: int, dtype: torch.dtype) -> RowLayout:
    return RowLayout(Raw(dtype), Raw(dtype), dim, dtype)


def poisoned(batch: int, heads: int, slots: int, layout: RowLayout) -> Tensor:
    """Rows of NaN in every dtype."""
    return torch.full((batch, heads, slots, layout.row_bytes), 255, dtype=torch.uint8)


def placed(k: Tensor, v: Tensor, ids: Tensor, spare: int = 7) -> tuple[Tensor, Tensor, RowLayout]:
    """Rows of the tokens `ids` [B, Hk, K] of k and v [B, Hk, T, D], and the slots they are in.

    Slots are -1 where ids are; `spare` slots of every head are free.
    """
    (batch, heads, count), layout = ids.shape, layout_of(k.shape[-1], k.dtype)
    hot = poisoned(batch, heads, count + spare, layout)
    generator = torch.Generator().manual_seed(count)
    slots = torch.empty(ids.shape, dtype=torch.int32)
    for b in range(batch):
        rows = layout.encode(k[b], v[b])
        for h in range(heads):
            order = torch.randperm(count + spare, generator=generator)[:count]
            slots[b, h] = torch.where(ids[b, h] >= 0, order, -1)
            hot[b, h, order[ids[b, h] >= 0]] = rows[h, ids[b, h][ids[b, h] >= 0].long()]
    return hot, slots, layout


def some_ids(lengths: list[int], heads: int, count: int, seed: int = 0) -> Tensor:
    """[B, heads, count]: up to `count` tokens of each context, ascending, then -1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), heads, count), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for h in range(heads):
            picked = torch.randperm(length, generator=generator)[:count].sort().values
            ids[b, h, : len(picked)] = picked
    return ids


def queries(batch: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(heads * dim)
    return (2 * torch.randn(batch, heads, dim, generator=generator)).to(dtype)


def contexts(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + dim)
    k, v = (torch.randn(batch, heads, length, dim, generator=generator) for _ in range(2))
    return k.to(dtype), v.to(dtype)
