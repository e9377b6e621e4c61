"""Pools that overflow to disk, and leases of them filled with known numbers."""

from pathlib import Path

import torch

from kvstore.pool.pool import Pool
from kvstore.pool.spill import Spill
from kvstore.rows import PoolShape, Raw, RowLayout

FP32 = Raw(torch.float32)


def shaped(dim=8, tokens=4, layers=2):
    return PoolShape(layers, 2, RowLayout(FP32, FP32, dim, torch.float32), tokens)


SMALL = shaped()  # blocks of 512 B, which share LMDB's pages
LARGE = shaped(dim=64, tokens=16)  # of 16 KiB, with pages of their own


def disk_bytes(shape, blocks):
    pages = -(-(shape.layer_bytes + 16) // 4096)
    return blocks * shape.num_layers * pages * 4096


def made(folder, shape=LARGE, slots=3, blocks=20, tier=Pool):
    spill = Spill(Path(folder) / "spill", disk_bytes(shape, blocks))
    return tier(shape, slots * shape.block_bytes, spill=spill)


def numbers(shape, count, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (shape.num_layers, 2, shape.num_kv_heads, count, shape.layout.head_dim)
    return torch.randn(size, generator=generator)


def filled(pool, count, seed=0):
    lease = pool.lease()
    return lease, fill(lease, pool, count, seed)


def fill(lease, pool, count, seed):
    lease.reserve(count)
    data = numbers(pool.shape, count, seed)
    for layer, (k, v) in enumerate(data):
        lease.write(layer, 0, k, v)
    return data


def right(lease, layer, ids, data):
    got = lease.gather(layer, ids)
    index = ids[..., None].expand(-1, -1, data.shape[-1])
    return all(torch.equal(x, data[layer, i].gather(1, index)) for i, x in enumerate(got))


def all_ids(pool, count):
    return torch.arange(count).expand(pool.shape.num_kv_heads, -1)
