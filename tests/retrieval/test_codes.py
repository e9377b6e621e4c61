"""Packed codes against the codes that went in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.codes import Codes, packed, unpacked


def random(hk, t, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (hk, t, m), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(hk, t, generator=generator)


def held(codes):
    return unpacked(codes.packed)[:, : codes.length]


def test_a_byte_holds_token_i_and_token_i_plus_16():
    codes, _ = random(2, 64, 3)
    got = packed(codes)
    assert got.shape == (2, 2, 3, 16)
    assert got[1, 1, 2, 5] == codes[1, 32 + 5, 2] + 16 * codes[1, 32 + 21, 2]
    assert torch.equal(unpacked(got), codes)


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 9), st.lists(st.integers(0, 100), max_size=8), st.booleans()
)
def test_codes_appended_in_any_cut_are_those_of_one_append(hk, m, cuts, scaled):
    codes, scales = random(hk, sum(cuts), m)
    got, at = Codes(hk, m, scaled=scaled), 0
    for cut in cuts:
        part = slice(at, at + cut)
        got.append(codes[:, part], scales[:, part] if scaled else None)
        at += cut
    assert got.length == sum(cuts)
    assert got.packed.shape[1] == -(-sum(cuts) // 32)
    assert torch.equal(held(got), codes)
    assert (got.scales is None) == (not scaled)
    if scaled:
        assert torch.equal(got.scales, scales.half())


@pytest.mark.parametrize("length", [32, 45])
def test_two_that_go_on_from_one_state_do_not_disturb_each_other(length):
    codes, scales = random(2, 200, 5)
    first = Codes(2, 5, scaled=True)
    first.append(codes[:, :length], scales[:, :length])
    state = first.state()
    second, third = Codes.from_state(state), Codes.from_state(state)
    other, _ = random(2, 200, 5, seed=1)
    for i in range(length, 100, 5):
        first.append(codes[:, i : i + 5], scales[:, i : i + 5])
        second.append(other[:, i : i + 5], scales[:, i : i + 5])
    assert torch.equal(held(first), codes[:, : first.length])
    assert torch.equal(held(second)[:, :length], codes[:, :length])
    assert torch.equal(held(second)[:, length:], other[:, length : second.length])
    assert torch.equal(held(third), codes[:, :length])
    third.append(codes[:, length : length + 1], scales[:, length : length + 1])
    assert torch.equal(held(third), codes[:, : length + 1])


def test_memory_is_that_of_the_codes_and_room_to_grow():
    codes, scales = random(2, 3200, 16)
    got = Codes(2, 16, scaled=True)
    got.append(codes, scales)
    assert got.nbytes == 2 * 3200 * (8 + 2)
    got.append(codes[:, :1], scales[:, :1])
    assert got.nbytes <= 2 * 3200 * (8 + 2) * 1.5 + 1000


def test_scales_come_with_every_token_or_none():
    codes, scales = random(1, 10, 2)
    with pytest.raises(ValueError, match="scales come with every token"):
        Codes(1, 2, scaled=False).append(codes, scales)
    with pytest.raises(ValueError, match="scales come with every token"):
        Codes(1, 2, scaled=True).append(codes)
