"""Trials of the kernels that move rows: from host memory to hot slots, and a new one to both."""

from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels import rebuild
from engine.model.rope import FarTable, Rope
from gpu_bench.choosing import HOT
from gpu_bench.trial import ROUNDED, Sizes, Trial, size
from kvstore.kernels import append, gather
from kvstore.kernels.part import hot_rows
from kvstore.kernels.resolve import Resolved
from kvstore.rows import Raw, RowLayout

BLOCK = 64  # tokens
RANK = 160  # of keys, as ShadowKV has it


def layout_of(sizes: Sizes) -> RowLayout:
    """Keys and values as they are, as the default method keeps them."""
    return RowLayout(Raw(sizes.dtype), Raw(sizes.dtype), sizes.dim, sizes.dtype)


@lru_cache(maxsize=1)
def slab(sizes: Sizes) -> Tensor:
    """Random rows of as many tokens as one request has, page-locked where there is a GPU."""
    shape = (sizes.tokens // BLOCK, sizes.heads, BLOCK, layout_of(sizes).row_bytes)
    pinned = sizes.device.type == "cuda"
    made = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    return made.copy_(finite(sizes, *shape))


def finite(sizes: Sizes, *shape: int) -> Tensor:
    """Random numbers of the dtype, as the bytes of rows."""
    count = (*shape[:-1], shape[-1] // sizes.dtype.itemsize)
    return sizes.randn(*count).view(torch.uint8)


def blocks_of(sizes: Sizes) -> Tensor:
    """Block tables: all of the slab for each request, each in an order of its own."""
    shape = sizes.batch, sizes.tokens // BLOCK
    return torch.rand(shape, device=sizes.device).argsort(-1).int()


def some(sizes: Sizes, of: int) -> Tensor:
    """[B, Hk, K] distinct numbers below `of`, ascending."""
    scattered = torch.rand(sizes.batch, sizes.heads, of, device=sizes.device).argsort(-1)
    return scattered[..., : sizes.budget].sort(-1).values.int()


def fetched(sizes: Sizes) -> Trial:
    """A budget of tokens, none of which is there: rows of 512 bytes all over host memory."""
    layout, there = layout_of(sizes), slab(sizes)
    hot_layout, slots = hot_rows(layout), round(HOT * sizes.budget) + 16
    hot = finite(sizes, sizes.batch, sizes.heads, slots, hot_layout.row_bytes)
    tokens, target = some(sizes, sizes.tokens), some(sizes, slots)
    count = torch.full(tokens.shape[:2], sizes.budget, dtype=torch.int32, device=sizes.device)
    found, blocks = Resolved(target, tokens, target, count), blocks_of(sizes)

    def run() -> list[Tensor]:
        gather.gather(there, blocks, layout, found, hot, hot_layout)
        return [hot]

    def define() -> list[Tensor]:
        own = hot.cpu()
        listed = Resolved(*(x.cpu() for x in found))
        gather.gather_torch(there, blocks.cpu(), layout, listed, own, hot_layout)
        return [own.to(hot.device)]

    return Trial(run, define, tokens.numel() * layout.row_bytes, link="pcie")


def appended(sizes: Sizes) -> Trial:
    """One new row for every request and head."""
    layout, there = layout_of(sizes), slab(sizes)
    hot_layout = hot_rows(layout)
    k, v = (sizes.randn(sizes.batch, sizes.heads, sizes.dim) for _ in range(2))
    at = torch.full((sizes.batch,), sizes.tokens - 3, dtype=torch.int32, device=sizes.device)
    hot = finite(sizes, sizes.batch, sizes.heads, 64, hot_layout.row_bytes)
    place = torch.randint(0, 64, k.shape[:2], dtype=torch.int32, device=sizes.device)
    blocks = torch.arange(len(there), dtype=torch.int32, device=sizes.device)
    blocks = blocks.roll(1).repeat(sizes.batch, 1)
    blocks[:, -1] = torch.arange(sizes.batch)  # what is written is each request's own

    def run() -> list[Tensor]:
        append.append(k, v, at, there, blocks, layout, hot, hot_layout, place)
        return [there[: sizes.batch], hot]

    def define() -> list[Tensor]:
        own, rows = hot.cpu(), there[: sizes.batch].clone()
        new_k, new_v, where, listed, slots = (x.cpu() for x in (k, v, at, blocks, place))
        append.append_torch(new_k, new_v, where, rows, listed, layout, own, hot_layout, slots)
        return [rows, own.to(hot.device)]

    return Trial(run, define, 2 * size((k, v)), link="pcie")


def rebuilt(sizes: Sizes) -> Trial:
    """The keys of a budget of tokens, from low-rank coordinates, rotated, into their hot slots."""
    layout, slots = layout_of(sizes), round(HOT * sizes.budget) + 16
    rank, per_head = min(RANK, sizes.heads * sizes.dim), (sizes.batch, sizes.heads)
    factors = rebuild.Factors(
        sizes.randn(sizes.batch, sizes.tokens, rank),
        sizes.randn(*per_head, rank, sizes.dim, dtype=torch.float32),
        sizes.randn(*per_head, sizes.dim, dtype=torch.float32),
    )
    half = torch.arange(sizes.dim // 2, dtype=torch.float64, device=sizes.device)
    rope = Rope(500_000.0 ** (-2 * half / sizes.dim))
    far = FarTable(rope, sizes.tokens)
    angles = rebuild.Angles(far.near, far.far)
    tokens, target = some(sizes, sizes.tokens), some(sizes, slots)
    hot = finite(sizes, sizes.batch, sizes.heads, slots, layout.row_bytes)
    given = factors, tokens, target, angles

    def run() -> list[Tensor]:
        rebuild.rebuild(*given, hot, layout)
        return [hot.view(sizes.dtype)]

    def define() -> list[Tensor]:
        own = hot.clone()
        rebuild.rebuild_torch(*given, own, layout)
        return [own.view(sizes.dtype)]

    read = tokens.numel() * (rank * sizes.dtype.itemsize + 8)
    written = tokens.numel() * sizes.dim * sizes.dtype.itemsize
    return Trial(run, define, read + size(factors[1:]) + written, tolerance=ROUNDED[sizes.dtype])
