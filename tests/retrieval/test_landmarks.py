"""Chunk means, and outliers that are chosen as their definition says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import landmarks
from retrieval.index import KVIndex
from retrieval.landmarks import Landmarks
from retrieval.select import Policy, top_tokens
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


def plain_outliers(keys, chunk, count):
    """Chunk ids of each head, by the definition, in double precision."""
    found = []
    for head in keys.double():
        worst = []
        for i in range(len(head) // chunk):
            run = head[i * chunk : (i + 1) * chunk]
            mean = sum(run) / chunk
            worst.append((min(float(k @ mean / (k.norm() * mean.norm())) for k in run), i))
        found.append(sorted(i for _, i in sorted(worst)[:count]))
    return found


def plain_means(keys, chunk):
    return torch.stack([run.mean(1) for run in keys.double().split(chunk, 1)], 1)


@pytest.mark.parametrize(("hk", "group", "dim"), SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_chunk_scores_as_its_mean_does(hk, group, dim, length, dtype):
    keys, query = make_keys(hk, length, dim, dtype), make_query(hk * group, dim, dtype)
    index = Landmarks(hk, dim, dtype, outlier_chunks=0)
    assert isinstance(index, KVIndex)
    fill(index, keys, [], length)
    want = plain_scores(query, plain_means(keys, 8).to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.01 * float(want.abs().max())
    torch.testing.assert_close(index.score(query).double(), want, rtol=0, atol=tolerance)
    assert (index.length, index.outliers.shape) == (length, (hk, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [64, 80])
def test_chunks_of_one_token_are_exact(dtype, dim):
    keys, query = make_keys(2, 127, dim, dtype), make_query(8, dim)
    index = fill(Landmarks(2, dim, dtype, chunk=1, outlier_chunks=0), keys, [], 100)
    want = plain_scores(query, keys)
    torch.testing.assert_close(index.score(query).double(), want, rtol=1e-5, atol=1e-4)


def test_before_finalize_a_chunk_scores_its_best_key_and_nothing_is_an_outlier():
    keys, query = make_keys(2, 127, 64), make_query(4, 64)
    index = Landmarks(2, 64)
    index.append(keys)
    want = [run.amax(1) for run in plain_scores(query, keys).split(8, 1)]
    got = index.score(query).double()
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-5, atol=1e-4)
    assert index.outliers.shape == (2, 0)


@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_outliers_are_the_full_chunks_whose_mean_is_furthest_from_a_key(chunk, count, monkeypatch):
    monkeypatch.setattr(landmarks, "RUN_ELEMENTS", 3 * 64 * chunk * 4)  # compared in several runs
    keys, query = make_keys(3, 127, 64), make_query(6, 64)
    index = fill(Landmarks(3, 64, chunk=chunk, outlier_chunks=count), keys, [], 127)
    chosen = plain_outliers(keys, chunk, count)
    tokens = [[c * chunk + i for c in head for i in range(chunk)] for head in chosen]
    assert index.outliers.tolist() == tokens
    out = index.score(query).isneginf().unflatten(0, (3, 2))
    assert [row.nonzero().flatten().tolist() for row in out[:, 0]] == chosen
    assert torch.equal(out[:, 0], out[:, 1])
    assert count < 1000 or len(chosen[0]) == 127 // chunk  # all full ones, not the partial last


def test_a_chunk_with_a_stranger_in_it_is_an_outlier():
    keys = make_keys(1, 1, 64).expand(2, 80, 64) + 0.01 * torch.randn(2, 80, 64)
    keys[0, 37] *= -1
    keys[1, 70] *= -1
    index = fill(Landmarks(2, 64, outlier_chunks=1), keys, [], 80)
    assert index.outliers[:, 0].tolist() == [32, 64]


def test_keys_after_the_prompt_are_summarised_and_never_outliers():
    keys, query = make_keys(2, 127, 64), make_query(4, 64)
    index = fill(Landmarks(2, 64, outlier_chunks=3), keys, range(61, 127), 61)
    assert (
        index.outliers.tolist()
        == fill(Landmarks(2, 64, outlier_chunks=3), keys[:, :61], [], 61).outliers.tolist()
    )
    want = plain_scores(query, plain_means(keys, 8))
    got = index.score(query).double()
    torch.testing.assert_close(
        got, want.masked_fill(got.isneginf(), -torch.inf), rtol=1e-5, atol=1e-4
    )
    assert got.isneginf().sum(1).tolist() == [3] * 4


def test_a_partial_chunk_counts_with_the_mean_of_what_is_there():
    keys, query = make_keys(2, 40, 64), make_query(4, 64)
    index = Landmarks(2, 64, outlier_chunks=0)
    index.finalize()
    for i in range(40):
        index.append(keys[:, i : i + 1])
        want = plain_scores(query, plain_means(keys[:, : i + 1], 8))
        torch.testing.assert_close(index.score(query).double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@given(cuts=st.lists(st.integers(1, 126)), prompt=st.integers(0, 127))
@settings(max_examples=30)
def test_any_cut_gives_the_same_tokens_and_means(dtype, cuts, prompt):
    keys, query = make_keys(2, 127, 64, dtype), make_query(8, 64, dtype)
    once, cut = (
        fill(Landmarks(2, 64, dtype, outlier_chunks=4), keys, some, prompt) for some in ([], cuts)
    )
    for name, tensor in once.state().items():
        assert torch.equal(tensor, cut.state()[name]), name
    chosen = [
        top_tokens(
            index.score(query),
            Policy(budget=60),
            num_kv_heads=2,
            length=127,
            scale=0.125,
            unit=8,
            outliers=index.outliers,
        )
        for index in (once, cut)
    ]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("finalized", [True, False])
def test_relocating_equals_building_at_other_positions(dtype, finalized):
    plain, query = make_keys(2, 127, 64), make_query(4, 64, dtype)
    here, there = (rotate(plain, range(s, s + 127)).to(dtype) for s in (5, 1005))
    made = [Landmarks(2, 64, dtype, outlier_chunks=3) for _ in range(2)]
    for index, keys in zip(made, (here, there)):
        fill(index, keys, [], 100) if finalized else index.append(keys)
    before = through_bytes(made[0].state())
    moved = made[0].relocate(1000, turn_by(1000))
    want = made[1].score(query)
    tolerance = 1e-4 if dtype == torch.float32 else 0.01 * float(plain_scores(query, there).max())
    torch.testing.assert_close(moved.score(query), want, rtol=0, atol=tolerance)
    assert torch.equal(moved.outliers, made[1].outliers)
    assert all(torch.equal(before[name], t) for name, t in made[0].state().items())
    for index in (moved, made[1]):
        index.append(there[:, :9])
    torch.testing.assert_close(moved.score(query), made[1].score(query), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_it_takes_what_it_says_and_forgets_the_keys(dtype):
    keys = make_keys(2, 8 * 60, 64, dtype)
    index = Landmarks(2, 64, dtype)
    index.append(keys)
    assert index.nbytes == keys.nbytes
    index.finalize()
    chosen = 2 * 48 * 8
    assert index.nbytes - chosen == 2 * 480 * index.spec.bytes_per_token == keys.nbytes / 8
    index = fill(Landmarks(2, 64, dtype), keys[:, :479], [], 479)
    most = 2 * (480 * index.spec.bytes_per_token * 1.5 + index.spec.shared_bytes)
    assert keys.nbytes / 8 < index.nbytes <= most


@pytest.mark.parametrize("finalized", [True, False])
def test_a_state_makes_an_index_that_goes_on_by_itself(finalized):
    keys, query = make_keys(2, 60, 64), make_query(4, 64)
    index = Landmarks(2, 64, outlier_chunks=2)
    fill(index, keys[:, :50], range(40, 50), 40) if finalized else index.append(keys[:, :50])
    state = index.state()
    kept = through_bytes(state)
    copies = [Landmarks.from_state(s) for s in (state, state, kept)]
    for copy in copies:
        assert (copy.length, copy.spec) == (50, index.spec)
        assert torch.equal(copy.score(query), index.score(query))
        assert torch.equal(copy.outliers, index.outliers)
    for i, copy in enumerate([index, *copies]):
        for t in range(50, 60):
            copy.append(keys[:, t : t + 1] * (i + 1))
        if not finalized:
            copy.finalize()
    for i, copy in enumerate([index, *copies]):
        both = torch.cat([keys[:, :50], keys[:, 50:] * (i + 1)], 1)
        alone = fill(Landmarks(2, 64, outlier_chunks=2), both, [], 40 if finalized else 60)
        torch.testing.assert_close(copy.score(query), alone.score(query))
        assert torch.equal(copy.outliers, alone.outliers)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_settings_and_misuse_are_named():
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Landmarks(1, 64, chunk=0)
    with pytest.raises(ValueError, match="outlier_chunks must not be negative"):
        Landmarks(1, 64, outlier_chunks=-1)
    index = fill(Landmarks(1, 64), make_keys(1, 40, 64), [], 40)
    with pytest.raises(RuntimeError, match="finalized"):
        index.finalize()
