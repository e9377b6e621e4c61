"""The index that keeps every key."""

import pytest
import torch

from retrieval.exact import Exact
from retrieval.index import KVIndex
from tests.retrieval.keys import (
    DTYPES,
    LENGTHS,
    SHAPES,
    fill,
    make_keys,
    make_query,
    plain_scores,
    rotate,
    through_bytes,
    turn_by,
)


@pytest.mark.parametrize(("hk", "group", "dim"), SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_scores_are_those_of_all_keys_finalized_or_not(hk, group, dim, length, dtype):
    keys, query = make_keys(hk, length, dim, dtype), make_query(hk * group, dim, dtype)
    index = Exact(hk, dim, dtype)
    assert isinstance(index, KVIndex)
    index.append(keys)
    want = plain_scores(query, keys)
    torch.testing.assert_close(index.score(query).double(), want, rtol=1e-5, atol=1e-4)
    before = index.score(query)
    index.finalize()
    assert torch.equal(index.score(query), before)
    assert (index.length, index.outliers.shape) == (length, (hk, 0))


def test_any_cut_gives_the_same_scores():
    keys, query = make_keys(2, 300, 64), make_query(8, 64)
    once = fill(Exact(2, 64), keys, [], 300)
    cut = fill(Exact(2, 64), keys, [1, 2, 63, 200, *range(250, 300)], 200)
    assert torch.equal(once.score(query), cut.score(query))


def test_it_takes_what_it_says():
    index = fill(Exact(2, 80, torch.bfloat16), make_keys(2, 100, 80, torch.bfloat16), [], 100)
    assert index.nbytes == 2 * 100 * index.spec.bytes_per_token == 2 * 100 * 160


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_relocating_equals_keys_at_other_positions(dtype):
    plain = make_keys(2, 127, 64)
    here, there = (rotate(plain, range(s, s + 127)).to(dtype) for s in (5, 1005))
    index = fill(Exact(2, 64, dtype), here, [], 127)
    moved, query = index.relocate(1000, turn_by(1000)), make_query(4, 64)
    want = plain_scores(query, there)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02 * float(want.abs().max())
    torch.testing.assert_close(moved.score(query).double(), want, rtol=0, atol=tolerance)
    assert torch.equal(index.state()["keys"], here)


def test_a_state_makes_an_index_that_goes_on_by_itself():
    keys, query = make_keys(2, 60, 64), make_query(4, 64)
    index = fill(Exact(2, 64), keys[:, :40], [], 40)
    state = index.state()
    copies = [Exact.from_state(s) for s in (state, state, through_bytes(state))]
    for i, copy in enumerate([index, *copies]):
        copy.append(keys[:, 40:] * (i + 1))
    for i, copy in enumerate([index, *copies]):
        want = torch.cat([keys[:, :40], keys[:, 40:] * (i + 1)], 1)
        assert torch.equal(copy.state()["keys"], want)
        assert copy.spec == index.spec
    assert torch.equal(state["keys"], keys[:, :40])
    torch.testing.assert_close(copies[0].score(query)[:, :40], index.score(query)[:, :40])
