"""Page bounds against all keys of the page."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retrieval.index import KVIndex, NotRelocatable
from retrieval.quest import Quest
from tests.retrieval.keys import (
    DTYPES,
    LENGTHS,
    SHAPES,
    fill,
    make_keys,
    make_query,
    plain_scores,
    through_bytes,
    turn_by,
)


def plain_bounds(query, keys, page):
    """Σ max(q·min, q·max) channel by channel, page by page, in double precision."""
    group = len(query) // len(keys)
    q, found = query.double()[:, None], []
    for run in keys.double().repeat_interleave(group, 0).split(page, 1):
        low, high = run.amin(1, keepdim=True), run.amax(1, keepdim=True)
        found.append(torch.maximum(q * low, q * high).sum(-1))
    return torch.cat(found, 1)


@pytest.mark.parametrize(("hk", "group", "dim"), SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_scores_are_the_sum_of_the_better_bounds(hk, group, dim, length, dtype):
    keys, query = make_keys(hk, length, dim, dtype), make_query(hk * group, dim, dtype)
    index = Quest(hk, dim, dtype)
    assert isinstance(index, KVIndex)
    fill(index, keys, [], length)
    want = plain_bounds(query, keys, 16)
    torch.testing.assert_close(index.score(query).double(), want, rtol=1e-5, atol=1e-3)
    assert (index.length, index.outliers.shape) == (length, (hk, 0))


@given(
    page=st.integers(1, 9),
    prompt=st.integers(0, 20),
    values=hnp.arrays("float32", (2, 20, 4), elements=st.floats(-100, 100, width=16)),
    query=hnp.arrays("float32", (4, 4), elements=st.floats(-100, 100, width=16)),
    dtype=st.sampled_from(DTYPES),
)
def test_no_key_scores_more_than_its_page(page, prompt, values, query, dtype):
    keys, query = torch.from_numpy(values).to(dtype), torch.from_numpy(query)
    index = Quest(2, 4, dtype, page=page)
    for i in range(20):
        if i == prompt:
            index.finalize()
        index.append(keys[:, i : i + 1])
        bound = index.score(query)
        assert bound.shape == (4, i // page + 1)
        scores = plain_scores(query, keys[:, : i + 1])
        of_page = bound.repeat_interleave(page, 1)[:, : i + 1].double()
        rounding = 1e-6 * plain_scores(query.abs(), keys[:, : i + 1].abs()).amax()
        assert (scores <= of_page + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_bounds_are_keys_to_the_bit(dtype):
    keys = make_keys(2, 48, 64, dtype)
    high, low = fill(Quest(2, 64, dtype), keys, [], 48).state()["summaries"].chunk(2, -1)
    pages = keys.unflatten(1, (3, 16))
    assert torch.equal(high, pages.amax(2))
    assert torch.equal(low, pages.amin(2))


def test_pages_of_one_token_are_exact():
    keys, query = make_keys(2, 127, 64), make_query(4, 64)
    index = fill(Quest(2, 64, page=1), keys, [], 100)
    want = plain_scores(query, keys)
    torch.testing.assert_close(index.score(query).double(), want, rtol=1e-5, atol=1e-4)


def test_before_finalize_a_page_scores_its_best_key():
    keys, query = make_keys(2, 127, 64), make_query(4, 64)
    index = Quest(2, 64)
    index.append(keys)
    want = [run.amax(1) for run in plain_scores(query, keys).split(16, 1)]
    got = index.score(query).double()
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@given(cuts=st.lists(st.integers(1, 126)), prompt=st.integers(0, 127))
@settings(max_examples=30)
def test_any_cut_gives_the_same_bounds(dtype, cuts, prompt):
    keys = make_keys(2, 127, 64, dtype)
    once = fill(Quest(2, 64, dtype), keys, [], 127).state()
    cut = fill(Quest(2, 64, dtype), keys, cuts, prompt).state()
    assert once.keys() == cut.keys()
    assert all(torch.equal(once[name], cut[name]) for name in once)


def test_it_takes_what_it_says_and_forgets_the_keys():
    keys = make_keys(2, 16 * 20, 64, torch.bfloat16)
    index = Quest(2, 64, torch.bfloat16)
    index.append(keys)
    assert index.nbytes == keys.nbytes
    index.finalize()
    assert index.nbytes == 2 * 320 * index.spec.bytes_per_token == keys.nbytes / 8
    index = fill(Quest(2, 64, torch.bfloat16), keys[:, :319], [], 319)
    most = 2 * (320 * index.spec.bytes_per_token * 1.5 + index.spec.shared_bytes)
    assert keys.nbytes / 8 < index.nbytes <= most
    held = index.state()["open"].untyped_storage().nbytes()
    assert held == 2 * index.spec.shared_bytes  # not the memory of all keys
    index.append(keys[:, :1])
    assert index.state()["open"].nbytes == 0


def test_it_cannot_be_moved():
    index = fill(Quest(1, 64), make_keys(1, 40, 64), [], 40)
    with pytest.raises(NotRelocatable, match="7 positions later: append the keys"):
        index.relocate(7, turn_by(7))
    assert index.spec.relocatable == "rebuild"


@pytest.mark.parametrize("prompt", [40, 41, 48, 61])
def test_a_state_makes_an_index_that_goes_on_by_itself(prompt):
    keys, query = make_keys(2, 60, 64), make_query(4, 64)
    index, cuts = Quest(2, 64, page=8), range(40, 60)
    fill(index, keys[:, :50], cuts, min(prompt, 50)) if prompt < 60 else index.append(keys[:, :50])
    state = index.state()
    kept = through_bytes(state)
    copies = [Quest.from_state(s) for s in (state, state, kept)]
    for copy in copies:
        assert (copy.length, copy.spec) == (50, index.spec)
        assert torch.equal(copy.score(query), index.score(query))
    for i, copy in enumerate([index, *copies]):
        for t in range(50, 60):
            copy.append(keys[:, t : t + 1] * (i + 1))
    for i, copy in enumerate([index, *copies]):
        if prompt > 60:
            copy.finalize()
        both = torch.cat([keys[:, :50], keys[:, 50:] * (i + 1)], 1)
        torch.testing.assert_close(
            copy.score(query).double(), plain_bounds(query, both, 8), rtol=1e-5, atol=1e-4
        )
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_settings_and_misuse_are_named():
    with pytest.raises(ValueError, match="page must be at least 1"):
        Quest(1, 64, page=0)
    index = fill(Quest(1, 64), make_keys(1, 40, 64), [], 40)
    with pytest.raises(RuntimeError, match="finalized"):
        index.finalize()
    with pytest.raises(ValueError, match=r"takes \[1, N, 64\] in torch.float32"):
        Quest(1, 64).append(make_keys(1, 4, 64, torch.bfloat16))
