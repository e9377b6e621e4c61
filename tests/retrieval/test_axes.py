"""Bits go to where keys vary, and the axes are those of the keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval.axes import LOST, Axes, allot, groups


def steep(heads=2, count=3000, dim=64, seed=0):
    """Keys whose variances fall as 1 / rank, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q
    return (
        torch.randn(heads, count, dim, generator=generator)
        * torch.arange(1, dim + 1).rsqrt()
        @ turn
    )


def lost(variances, sizes):
    kept = sum(
        (1 - LOST[bits]) * variances[start:stop].sum() for start, stop, bits in groups(sizes)
    )
    return float(variances.sum() - kept)


@pytest.mark.parametrize("dim", [16, 56, 64, 72, 80, 96, 100, 120, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_equal_variances_get_equal_bits(dim, bits):
    sizes = {1: (0, 0, dim), 2: (0, dim, 0), 4: (dim, 0, 0)}[bits]
    assert allot(torch.ones(dim), dim * bits // 4) == sizes


@given(st.lists(st.floats(0, 1e6), min_size=8, max_size=8).map(sorted), st.sampled_from([2, 4, 8]))
def test_codes_are_filled_and_nothing_loses_less(rising, subspaces):
    variances = torch.tensor(rising[::-1], dtype=torch.float64)
    sizes = allot(variances, subspaces)
    four, two, one = sizes
    assert 4 * four + 2 * two + one == 4 * subspaces
    assert sum(sizes) <= 8
    assert two % 2 == 0
    assert one % 4 == 0
    for four in range(9):
        for two in range(0, 9 - four, 2):
            one = 4 * subspaces - 4 * four - 2 * two
            if 0 <= one <= 8 - four - two:
                other = lost(variances, (four, two, one))
                assert lost(variances, sizes) <= other * (1 + 1e-9) + 1e-9


def test_variance_that_falls_takes_bits_with_it():
    four, _, one = allot(1 / torch.arange(1, 129), 64)
    assert four >= 16
    assert one == 2 * four


def test_axes_are_orthonormal_and_coordinates_vary_alike_within_a_group():
    keys = steep()
    axes = Axes.fit(keys, 32)
    assert sum(axes.sizes) == 64
    torch.testing.assert_close(axes.basis.mT @ axes.basis, torch.eye(64).expand(2, -1, -1))
    along = keys @ axes.basis / axes.spread[:, None]
    for start, stop, _ in groups(axes.sizes):
        assert axes.spread[:, start:stop].std(-1).max() == 0
        assert (along[..., start:stop].square().mean((1, 2)) - 1).abs().max() < 0.1
        assert along[..., start:stop].square().mean(1).max() < 1.6  # none of them stands out


def test_the_first_group_holds_most_of_the_variance():
    keys = steep()
    axes = Axes.fit(keys, 32)
    four = axes.sizes[0]
    held = (keys @ axes.basis[..., :four]).square().sum((1, 2)) / keys.square().sum((1, 2))
    best = (1 / torch.arange(1, 65))[:four].sum() / (1 / torch.arange(1, 65)).sum()
    assert (held - best).abs().max() < 0.03


def test_one_key_says_little_about_directions():
    key = torch.zeros(1, 1, 64)
    key[..., 0] = 8.0
    axes = Axes.fit(key, 32)
    spread = axes.spread.max() / axes.spread.min()
    assert spread < 10
    torch.testing.assert_close(axes.basis.mT @ axes.basis, torch.eye(sum(axes.sizes))[None])


def test_no_keys_and_keys_that_are_all_zero_give_equal_bits_and_unit_spread():
    for keys in (torch.zeros(2, 0, 64), torch.zeros(2, 5, 64)):
        axes = Axes.fit(keys, 32)
        assert axes.sizes == (0, 64, 0)
        assert torch.equal(axes.spread, torch.ones(2, 64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_keys_that_are_no_numbers_or_huge_are_left_out(bad):
    keys = steep()
    want = Axes.fit(keys, 32)
    keys[:, 7, 3] = bad
    got = Axes.fit(keys, 32)
    assert got.sizes == want.sizes
    torch.testing.assert_close(got.spread, want.spread, rtol=0.02, atol=0)


def test_the_same_keys_and_seed_give_the_same_axes():
    keys = steep()
    first, again, other = Axes.fit(keys, 32, 1), Axes.fit(keys, 32, 1), Axes.fit(keys, 32, 2)
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, other.basis)
    back = Axes.from_state(first.state())
    assert back.sizes == first.sizes
    assert torch.equal(back.basis, first.basis)
    assert first.nbytes == 4 * 2 * (64 * 64 + 64)
