"""Slabs, block tables and hot buffers of a batch, with poison where nothing was written."""

from dataclasses import dataclass

import torch

from kvstore.kernels.part import hot_rows
from kvstore.kernels.resolve import Resolved
from kvstore.rows import Int4, Int8, Raw, RowLayout

POISON = 0xFF  # NaN in every dtype
BF16, FP16, FP32 = Raw(torch.bfloat16), Raw(torch.float16), Raw(torch.float32)
LAYOUTS = {
    "bf16": RowLayout(BF16, BF16, 128, torch.bfloat16),
    "fp16": RowLayout(FP16, FP16, 80, torch.float16),
    "fp32": RowLayout(FP32, FP32, 64, torch.float32),
    "fp32 as fp16": RowLayout(FP32, FP16, 80, torch.float16),
    "values": RowLayout(None, BF16, 80, torch.bfloat16),
    "values, int4": RowLayout(None, Int4(), 128, torch.float16),
    "int8": RowLayout(Int8(), Int8(), 128, torch.float32),
    "int4": RowLayout(Int4(), Int4(), 64, torch.float32),
    "int4, 80": RowLayout(Int4(), Int4(), 80, torch.float16),
    "int8 and int4": RowLayout(Int8(), Int4(), 80, torch.float32),
    "int4 and int8": RowLayout(Int4(16), Int8(), 128, torch.bfloat16),
    "bf16 and int4": RowLayout(BF16, Int4(), 64, torch.bfloat16),
    "odd": RowLayout(Int8(), Int4(4), 33, torch.float32),
    "gaps": RowLayout(FP16, Int4(), 7, torch.float16),
    "few": RowLayout(Int4(), Int4(), 7, torch.float32),
}


@dataclass
class Batch:
    """Requests of some lengths, and everything that is known of their tokens."""

    layout: RowLayout
    lengths: list[int]
    k: torch.Tensor  # [B, Hk, T, D]
    v: torch.Tensor
    slab: torch.Tensor
    blocks: torch.Tensor
    hot: torch.Tensor

    @property
    def heads(self):
        return self.k.shape[1]

    def place(self, b, token):
        """Block and row of a token."""
        per_block = self.slab.shape[2]
        return int(self.blocks[b, token // per_block]), token % per_block

    def hot_row(self, k, v, old):
        """A hot row with these numbers [D]; K None leaves what was there."""
        layout, row = hot_rows(self.layout), old.clone()
        for numbers, at in ((k, layout.k_at), (v, layout.v_at)):
            if numbers is not None:
                raw = numbers.contiguous().view(torch.uint8)
                row[at : at + len(raw)] = raw
        return row


def batch(layout, *, heads=2, lengths=(37, 0, 64), block=16, slots=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (2, len(lengths), heads, max(lengths), layout.head_dim)
    scales = torch.rand(*size[:-1], 1, generator=generator) * 4 - 2
    k, v = (10**scales * torch.randn(size, generator=generator)).to(layout.dtype).unbind()
    per_request = max(lengths) // block + 2
    free = torch.randperm(len(lengths) * per_request + 2, generator=generator).int()
    slab = torch.full((len(free), heads, block, layout.row_bytes), POISON, dtype=torch.uint8)
    blocks = torch.full((len(lengths), per_request), -1, dtype=torch.int32)
    hot = (len(lengths), heads, slots, hot_rows(layout).row_bytes)
    made = Batch(layout, list(lengths), k, v, slab, blocks, torch.full(hot, POISON).byte())
    for b, length in enumerate(lengths):
        used = length // block + 1  # room for a token more
        blocks[b, :used], free = free[:used], free[used:]
        rows = layout.encode(k[b], v[b])
        for token in range(length):
            at, within = made.place(b, token)
            slab[at, :, within] = rows[:, token]
    return made


def misses(made, most, seed=0):
    """Some tokens of every request, distinct in a row, and distinct slots for them."""
    generator = torch.Generator().manual_seed(seed)
    slots = made.hot.shape[2]
    size = (len(made.lengths), made.heads, most)
    missing, target = (torch.full(size, -1, dtype=torch.int32) for _ in range(2))
    count = torch.zeros(size[:2], dtype=torch.int32)
    for b, length in enumerate(made.lengths):
        for h in range(made.heads):
            some = min(int(torch.randint(most + 1, (), generator=generator)), length)
            count[b, h] = some
            missing[b, h, :some] = torch.randperm(length, generator=generator)[:some]
            target[b, h, :some] = torch.randperm(slots, generator=generator)[:some]
    return Resolved(target, missing, target, count)


def same(got, want, dtype, ulps=0):
    """Bytes are equal, but for so many of the last place of numbers of `dtype`."""
    if not ulps:
        return torch.equal(got, want)
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    return int((got.view(kind).int() - want.view(kind).int()).abs().max()) <= ulps
