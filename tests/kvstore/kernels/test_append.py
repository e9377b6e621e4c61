"""The row of a new token: encoded as `RowLayout.encode` does, and raw in its hot slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.kernels.append import append, append_torch, append_triton
from kvstore.kernels.part import hot_rows
from kvstore.pool.pinned import PinnedTier
from kvstore.rows import PoolShape, RowLayout
from tests.kvstore.kernels.rows import LAYOUTS, batch

WAYS = [append_torch, append_triton]


def new(made, seed=0):
    """KV of one token a request, as far apart in size as fp16 goes."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, len(made.lengths), made.heads, made.layout.head_dim)
    sizes = 10 ** (torch.rand(*size[:-1], 1, generator=generator) * 8 - 4)
    return (sizes * torch.randn(size, generator=generator)).to(made.layout.dtype).unbind()


def expected(made, k, v, positions, slots):
    slab, hot = made.slab.clone(), made.hot.clone()
    rows = made.layout.encode(k, v)
    for b, position in enumerate(positions.tolist()):
        for h in range(made.heads if position >= 0 else 0):
            block, within = made.place(b, position)
            if block >= 0:
                slab[block, h, within] = rows[b, h]
            slot = int(slots[b, h])
            if slot >= 0:
                hot[b, h, slot] = made.hot_row(k[b, h], v[b, h], hot[b, h, slot])
    return slab, hot


def appended(way, made, k, v, positions, slots):
    slab, hot = made.slab.clone(), made.hot.clone()
    way(k, v, positions, slab, made.blocks, made.layout, hot, hot_rows(made.layout), slots)
    return slab, hot


def check(way, made, k, v, positions, slots):
    got = appended(way, made, k, v, positions, slots)
    for one, other in zip(got, expected(made, k, v, positions, slots)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_is_the_bytes_that_its_layout_says_and_nothing_else_changes(way, name):
    made = batch(LAYOUTS[name], lengths=(36, 0, 64, 16), block=16 if "8" in name else 64)
    positions = torch.tensor([36, -1, 64, 16], dtype=torch.int32)
    slots = torch.tensor([[3, 5], [1, 2], [0, 23], [7, -1]], dtype=torch.int32)
    check(way, made, *new(made, len(name)), positions, slots)


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_nothing_is_written_for_nobody(way):
    made = batch(LAYOUTS["int8 and int4"])
    nobody = torch.full((3,), -1, dtype=torch.int32)
    slots = torch.zeros(3, 2, dtype=torch.int32)
    got = appended(way, made, *new(made), nobody, slots)
    assert torch.equal(got[0], made.slab)
    assert torch.equal(got[1], made.hot)
    unplaced = torch.tensor([60, 0, 80], dtype=torch.int32)  # blocks that the tables lack
    check(way, made, *new(made), unplaced, slots)
    check(way, made, *new(made), torch.tensor([1, -1, 2], dtype=torch.int32), slots - 1)


def awkward(size, generator):
    """Numbers halfway between steps, equal ones, tiny ones, and some beyond fp16."""
    whole = torch.randint(-30, 31, (size,), generator=generator) / 2
    whole[0], whole[-1] = -15, 15
    far = torch.randn(size, generator=generator) * 4e4
    kinds = [whole, whole * 0 + whole[1], whole * 1e-9, whole * 0 + 0.0, far, far / 7]
    return kinds[int(torch.randint(len(kinds), (), generator=generator))].view(1, 1, -1)


@pytest.mark.parametrize("name", ["int8", "int4, 80", "odd"])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_any_numbers_are_rounded_as_torch_rounds(name, seed):
    generator, layout = torch.Generator().manual_seed(seed), LAYOUTS[name]
    layout = RowLayout(layout.k, layout.v, layout.head_dim, torch.float32)
    made = batch(layout, heads=1, lengths=(8,))
    k, v = (awkward(layout.head_dim, generator) for _ in range(2))
    check(append_triton, made, k, v, torch.tensor([8]).int(), torch.tensor([[2]]).int())


def test_append_takes_the_definition_on_a_cpu_and_refuses_what_kernels_cannot_write():
    made = batch(LAYOUTS["fp32"])
    k, v = new(made)
    positions, slots = torch.tensor([3, -1, 2]).int(), torch.zeros(3, 2).int()
    want = expected(made, k, v, positions, slots)
    hot, layout = hot_rows(made.layout), made.layout
    append(k, v, positions, made.slab, made.blocks, layout, made.hot, hot, slots)
    assert torch.equal(made.slab, want[0])
    assert torch.equal(made.hot, want[1])
    wrong = LAYOUTS["int8"]
    with pytest.raises(ValueError, match="hot rows must be"):
        append(k, v, positions, made.slab, made.blocks, layout, made.hot, wrong, slots)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpu_writes_the_same_bytes_to_a_page_locked_slab(name):
    layout = LAYOUTS[name]
    made = batch(layout, lengths=(36, 0, 64, 16))
    positions = torch.tensor([36, -1, 64, 16], dtype=torch.int32)
    slots = torch.tensor([[3, 5], [1, 2], [0, 23], [7, -1]], dtype=torch.int32)
    k, v = new(made)
    want = expected(made, k, v, positions, slots)
    shape = PoolShape(1, made.heads, layout, made.slab.shape[2])
    tier = PinnedTier(shape, len(made.slab) * shape.block_bytes, locked=True)
    slab = tier.slab(0)
    slab.copy_(made.slab)
    k, v, positions, blocks, hot, slots = (
        x.cuda() for x in (k, v, positions, made.blocks, made.hot, slots)
    )
    append(k, v, positions, slab, blocks, layout, hot, hot_rows(layout), slots)
    torch.cuda.synchronize()
    assert torch.equal(slab, want[0])
    assert torch.equal(hot.cpu(), want[1])
    tier.close()
