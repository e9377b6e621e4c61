"""Rows from a slab to hot buffers: every missing token's, and nothing else."""

import pytest
import torch

from kvstore.kernels import gather as module
from kvstore.kernels.gather import gather, gather_torch, gather_triton
from kvstore.kernels.part import hot_rows
from kvstore.kernels.resolve import Resolved
from kvstore.pool.pinned import PinnedTier
from kvstore.rows import Int4, Int8, PoolShape, Raw, RowLayout
from tests.kvstore.kernels.rows import LAYOUTS, batch, misses, same

WAYS = [gather_torch, gather_triton]


def expected(made, resolved):
    """The hot buffers by the codecs alone, one token at a time."""
    hot = made.hot.clone()
    for b, h in ((b, h) for b in range(len(made.lengths)) for h in range(made.heads)):
        for i in range(int(resolved.count[b, h])):
            token, slot = int(resolved.missing[b, h, i]), int(resolved.target[b, h, i])
            one = made.k[b, h, token], made.v[b, h, token]
            k, v = made.layout.decode(made.layout.encode(*(x[None, None] for x in one)))
            k = None if k is None else k[0, 0]
            hot[b, h, slot] = made.hot_row(k, v[0, 0], hot[b, h, slot])
    return hot


def gathered(way, made, resolved):
    hot = made.hot.clone()
    way(made.slab, made.blocks, made.layout, resolved, hot, hot_rows(made.layout))
    return hot


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_missing_row_is_decoded_to_its_slot_and_nothing_else_changes(way, name):
    layout = LAYOUTS[name]
    made = batch(layout, seed=len(name))
    resolved = misses(made, 13)
    got, want = gathered(way, made, resolved), expected(made, resolved)
    raw = all(codec is None or isinstance(codec, Raw) for codec in (layout.k, layout.v))
    # the interpreter does not round to bf16, it cuts off
    cut = way is gather_triton and layout.dtype == torch.bfloat16 and not raw
    assert same(got, want, layout.dtype, ulps=int(cut))
    assert not torch.equal(got, made.hot)


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("block", [4, 64])
def test_blocks_of_any_size_and_lists_of_any_length_are_gathered(way, heads, block, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 2)
    lengths = (1, 130, 0, 64)
    made = batch(LAYOUTS["int8 and int4"], heads=heads, lengths=lengths, block=block, slots=90)
    resolved = misses(made, 50, seed=heads)
    assert torch.equal(gathered(way, made, resolved), expected(made, resolved))


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_nothing_missing_changes_nothing_and_a_full_buffer_is_filled(way):
    made = batch(LAYOUTS["fp32"], lengths=(40, 30), slots=20)
    nowhere = torch.full((2, 2, 3), -1, dtype=torch.int32)
    none = Resolved(nowhere, nowhere, nowhere, torch.zeros(2, 2, dtype=torch.int32))
    assert torch.equal(gathered(way, made, none), made.hot)
    tokens = torch.arange(20, dtype=torch.int32).expand(2, 2, -1)
    slots = tokens.flip(2).contiguous()
    every = Resolved(slots, tokens.contiguous(), slots, torch.full((2, 2), 20).int())
    got = gathered(way, made, every)
    assert torch.equal(got, expected(made, every))
    assert torch.equal(
        hot_rows(made.layout).decode(got.flatten(0, 1)).k.flip(1)[0], made.k[0, 0, :20]
    )


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_what_lies_behind_the_lists_is_not_looked_at(way):
    """The kernel goes by `count` and leaves what is behind it alone."""
    made = batch(LAYOUTS["fp16"])
    resolved = misses(made, 9)
    behind = torch.arange(9) >= resolved.count[..., None]
    assert behind.any()
    spoilt = resolved._replace(missing=resolved.missing.masked_fill(behind, 1 << 28))
    if way is gather_triton:
        spoilt = spoilt._replace(target=resolved.target.masked_fill(behind, 1 << 28))
        assert torch.equal(gathered(way, made, spoilt), expected(made, resolved))
    made.blocks[:] = -1  # tokens without a block are nobody's
    assert torch.equal(gathered(way, made, resolved), made.hot)


def test_hot_rows_must_be_numbers_of_the_same_dtype_in_one_piece():
    made = batch(LAYOUTS["fp32"])
    resolved, right = misses(made, 3), hot_rows(made.layout)
    wrong = RowLayout(Int8(), Int4(), 64, torch.float32)
    with pytest.raises(ValueError, match="hot rows must be"):
        gather(made.slab, made.blocks, made.layout, resolved, made.hot, wrong)
    with pytest.raises(ValueError, match="hot must be contiguous rows of 512 bytes"):
        gather(made.slab, made.blocks, made.layout, resolved, made.hot[..., :256], right)
    with pytest.raises(ValueError, match="slab must be contiguous"):
        gather(made.slab.mT.contiguous().mT, made.blocks, made.layout, resolved, made.hot, right)
    want = expected(made, resolved)
    gather(made.slab, made.blocks, made.layout, resolved, made.hot, right)
    assert torch.equal(made.hot, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpu_reads_a_page_locked_slab_by_its_own_address(name):
    layout = LAYOUTS[name]
    made = batch(layout, lengths=(300, 0, 127, 64), slots=200, seed=3)
    resolved = misses(made, 150)
    want = expected(made, resolved)
    shape = PoolShape(1, made.heads, layout, made.slab.shape[2])
    tier = PinnedTier(shape, len(made.slab) * shape.block_bytes, locked=True)
    slab = tier.slab(0)
    assert slab.device.type == "cpu"
    slab.copy_(made.slab)
    here = [x.cuda() for x in (made.blocks, *resolved, made.hot)]
    hot = here[-1]
    gather(slab, here[0], layout, type(resolved)(*here[1:5]), hot, hot_rows(layout))
    assert torch.equal(hot.cpu(), want)
    tier.close()
