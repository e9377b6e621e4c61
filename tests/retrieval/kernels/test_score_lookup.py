"""Scores from tables against the same sums in double precision."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.kernels.score_lookup import (
    part_tokens,
    score_lookup,
    score_lookup_torch,
    score_lookup_triton,
)
from retrieval.kernels.scores import lse

SCALE = 0.25
WAYS = pytest.mark.parametrize(
    "way", [score_lookup_torch, score_lookup_triton], ids=["torch", "triton"]
)
LAYOUTS = [  # KV heads, G, codes, entries, dtype, capacity in tokens
    (2, 4, 1, 4160, torch.int16, 1100),  # more than one part
    (1, 3, 1, 65536, torch.int16, 127),
    (1, 1, 1, 256, torch.uint8, 300),
    (2, 4, 16, 256, torch.uint8, 300),
    (1, 8, 16, 256, torch.uint8, 127),
    (1, 3, 10, 256, torch.uint8, 300),  # bytes that do not fill words
    (1, 7, 2, 300, torch.int16, 70),  # two codes of 16 bits in a word
    (2, 1, 4, 2, torch.uint8, 1),
]

interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")


def make(heads, group, subspaces, entries, dtype, capacity, seed=0):
    """Codes that mean nothing where no token is, tables, the lengths of four slots."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(entries, (4, heads, capacity, subspaces), generator=generator)
    wide[..., 0, :] = entries - 1
    table = torch.randn(4, heads * group, subspaces, entries, generator=generator)
    lengths = torch.tensor([capacity, 0, 1, capacity * 2 // 3], dtype=torch.int32)
    for own, length in zip(wide, lengths.tolist()):
        own[:, length:] = 255 if dtype == torch.uint8 else 0xFFFF
    codes = wide.where(wide < 0x8000, wide - 0x10000) if dtype == torch.int16 else wide
    return wide, codes.to(dtype), table, lengths


def plain(wide, table, lengths):
    """[B, Hq, T] in double precision, token by token where there is one."""
    heads, capacity, subspaces = wide.shape[1:]
    group = table.shape[1] // heads
    raw = torch.full((len(wide), table.shape[1], capacity), -torch.inf, dtype=torch.float64)
    for slot, length in enumerate(lengths.tolist()):
        for head in range(table.shape[1]):
            codes = wide[slot, head // group, :length]
            taken = table[slot, head].double()[torch.arange(subspaces), codes]
            raw[slot, head, :length] = taken.sum(-1)
    return raw


def check(found, want, part):
    """Scores, the statistics of every part by definition, and what the softmax divides by."""
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.raw, want, **close)
    logs = torch.split(want * SCALE, part, -1)
    assert found.top.shape == (*want.shape[:2], len(logs))
    torch.testing.assert_close(found.top, torch.stack([x.amax(-1) for x in logs], -1), **close)
    total = [x.logsumexp(-1) - x.amax(-1).nan_to_num(neginf=0.0) for x in logs]
    torch.testing.assert_close(found.total, torch.stack(total, -1).exp(), **close)
    torch.testing.assert_close(lse(found), (want * SCALE).logsumexp(-1), **close)


@interpreter
@WAYS
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_sums_of_entries_and_what_is_behind_the_length_does_not_matter(way, layout):
    wide, codes, table, lengths = make(*layout)
    found = way(codes, table, lengths, SCALE)
    check(found, plain(wide, table, lengths), part_tokens(layout[2]))


@interpreter
@WAYS
def test_a_longer_length_than_there_is_room_for_is_the_capacity(way):
    _, codes, table, lengths = make(1, 2, 4, 16, torch.uint8, 50)
    codes %= 16
    full, over = torch.full_like(lengths, 50), torch.full_like(lengths, 51)
    for want, got in zip(way(codes, table, full, SCALE), way(codes, table, over, SCALE)):
        assert torch.equal(want, got)


@interpreter
@WAYS
def test_entries_may_be_minus_infinite(way):
    wide, codes, table, lengths = make(1, 3, 1, 20, torch.uint8, 300)
    table[0, 1, 0, :10] = -torch.inf
    table[0, 2] = -torch.inf  # a head without any score
    check(way(codes, table, lengths, SCALE), plain(wide, table, lengths), part_tokens(1))


def test_codes_that_are_not_contiguous_are_refused():
    _, codes, table, lengths = make(1, 1, 4, 16, torch.uint8, 6)
    with pytest.raises(ValueError, match="contiguous"):
        score_lookup_triton(codes.mT.contiguous().mT, table, lengths, SCALE)


def test_tensors_of_a_cpu_go_to_the_definition():
    _, *given = make(1, 2, 4, 256, torch.uint8, 20)
    for want, got in zip(score_lookup_torch(*given, SCALE), score_lookup(*given, SCALE)):
        assert torch.equal(want, got)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*LAYOUTS, (8, 4, 16, 256, torch.uint8, 20000)], ids=str)
def test_a_device_scores_as_double_precision_does(layout):
    wide, codes, table, lengths = make(*layout)
    found = score_lookup(codes.cuda(), table.cuda(), lengths.cuda(), SCALE)
    found = type(found)(*(x.cpu() for x in found))
    check(found, plain(wide, table, lengths), part_tokens(layout[2]))
