"""Low-rank keys against the SVD of all keys, and where they are exact."""

import pytest
import torch

from retrieval.lowrank import Gram, LowRankKeys, choose_rank
from tests.retrieval.keys import (
    DTYPES,
    LENGTHS,
    SHAPES,
    make_keys,
    make_query,
    rotate,
    through_bytes,
)


def gram_of(keys, cut=1000):
    gram = Gram(len(keys), keys.shape[2])
    for part in keys.split(cut, 1):
        gram.accumulate(part)
    return gram


def low_rank(keys, dtype=torch.float32, cut=1000, **how):
    made = LowRankKeys.from_gram(gram_of(keys), dtype=dtype, **how)
    for part in keys.split(cut, 1):
        made.append(part)
    return made


def every_row(made, hk):
    return made.rows(torch.arange(made.length).expand(hk, -1))


def joint(keys):
    return keys.double().transpose(0, 1).flatten(1)


def error(got, keys):
    return float((got.double() - keys.double()).norm() / keys.double().norm())


@pytest.mark.parametrize(("hk", "g", "d"), SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
def test_full_rank_is_the_exact_keys(hk, g, d, length, dtype, centred):
    keys = make_keys(hk, length, d, dtype)
    made = low_rank(keys, rank=min(length, hk * d), centred=centred)
    assert made.rank == min(length, hk * d)
    assert error(every_row(made, hk), keys) < 1e-5
    assert made.residual < 2e-3


@pytest.mark.parametrize("centred", [True, False])
def test_it_is_the_best_there_is_of_its_rank(centred):
    keys = make_keys(2, 300, 64)
    rows = joint(keys)
    mean = rows.mean(0) if centred else torch.zeros(128)
    for rank in (1, 20, 100):
        made = low_rank(keys, rank=rank, centred=centred)
        u, s, vh = torch.linalg.svd(rows - mean, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank] + mean
        got = joint(every_row(made, 2))
        torch.testing.assert_close(got, best, rtol=0, atol=1e-4)
        missed = (s[rank:].square().sum() / s.square().sum()).sqrt()
        assert made.residual == pytest.approx(float(missed), abs=2e-3)


def test_a_mean_that_dwarfs_the_keys_takes_no_digits():
    keys = make_keys(2, 300, 64)
    far = keys + 3000
    near, shifted = low_rank(keys, rank=40), low_rank(far, rank=40)
    off = every_row(shifted, 2) - 3000 - every_row(near, 2)
    assert off.abs().max() < 5e-3  # fp32 at 3000 has steps of 2.4e-4


@pytest.mark.parametrize("cut", [1, 7, 127, 299])
def test_the_cut_of_the_prompt_does_not_matter(cut):
    keys = make_keys(2, 300, 64)
    whole, parts = gram_of(keys), gram_of(keys, cut)
    assert parts.count == whole.count == 300
    torch.testing.assert_close(parts.mean(), whole.mean())
    torch.testing.assert_close(
        parts.directions().energy, whole.directions().energy, rtol=1e-4, atol=1e-2
    )
    one = LowRankKeys.from_gram(parts, rank=30, dtype=torch.float32)
    for part in keys.split(cut, 1):
        one.append(part)
    same = every_row(low_rank(keys, rank=30), 2)
    torch.testing.assert_close(every_row(one, 2), same, rtol=0, atol=1e-3)


def test_each_head_gets_its_own_tokens():
    keys = make_keys(4, 300, 64)
    made = low_rank(keys, rank=256)
    tokens = torch.randint(0, 300, (4, 50), generator=torch.Generator().manual_seed(0))
    want = torch.stack([own[ids] for own, ids in zip(keys, tokens)])
    torch.testing.assert_close(made.rows(tokens), want, rtol=0, atol=1e-4)
    assert made.rows(tokens[:, :0]).shape == (4, 0, 64)


def test_rank_by_energy_is_the_least_that_holds_it():
    keys = make_keys(2, 300, 64)
    energy = torch.linalg.svdvals(joint(keys) - joint(keys).mean(0)).square()
    held = energy.cumsum(0) / energy.sum()
    for share in (0.5, 0.9, 0.99):
        rank = low_rank(keys, energy=share).rank
        assert held[rank - 1] >= share - 1e-6
        assert held[rank - 2] < share
    assert low_rank(keys, energy=1.0).rank >= 127
    assert low_rank(keys[:, :1], energy=0.9).rank == 1  # no energy about the mean


def test_later_tokens_are_projected_and_their_drift_is_seen():
    keys = make_keys(2, 300, 64)
    made = low_rank(keys, rank=40)
    assert made.drift == 0
    before, residual = every_row(made, 2), made.residual
    strangers = 5 * torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(8))
    made.append(strangers)
    assert made.length == 350
    torch.testing.assert_close(every_row(made, 2)[:, :300], before)
    rows = joint(strangers) - joint(keys).mean(0)
    missed = (joint(every_row(made, 2)[:, 300:]) - joint(strangers)).norm() / rows.norm()
    assert made.drift == pytest.approx(float(missed), abs=2e-3)
    assert made.drift > 1.5 * residual
    assert made.residual == residual
    alike = low_rank(keys, rank=40)
    alike.append(keys[:, :100])
    assert alike.drift == pytest.approx(alike.residual, rel=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_state_is_the_keys(dtype):
    keys = make_keys(2, 300, 64)
    made = low_rank(keys, dtype, rank=40)
    again = LowRankKeys.from_state(through_bytes(made.state()))
    state = made.state()
    kept = LowRankKeys.from_state(state)
    made.append(keys[:, 5:20])
    again.append(keys[:, 5:20])
    assert torch.equal(every_row(again, 2), every_row(made, 2))
    assert (again.drift, again.residual) == (made.drift, made.residual)
    for before in (kept, LowRankKeys.from_state(state)):
        assert (before.length, before.drift) == (300, 0)


def test_moving_tokens_costs_nothing():
    keys = make_keys(2, 300, 64)
    made, tokens = low_rank(keys, rank=128), torch.tensor([[0, 5, 299], [3, 5, 7]])
    for delta in (0, 12_345):
        want = rotate(keys, torch.arange(300) + delta)
        got = torch.stack(
            [rotate(row[None], ids + delta)[0] for row, ids in zip(made.rows(tokens), tokens)]
        )
        for head in range(2):
            torch.testing.assert_close(got[head], want[head][tokens[head]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_takes_a_rank_of_numbers_per_token(dtype):
    keys = make_keys(2, 300, 64, dtype)
    made = LowRankKeys.from_gram(gram_of(keys), rank=40, dtype=dtype)
    made.append(keys)
    assert made.nbytes == 300 * 40 * dtype.itemsize + 4 * (128 * 40 + 128 + 4)
    whole = every_row(low_rank(keys, rank=40), 2)
    assert error(every_row(made, 2), whole) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_a_basis_of_one_head_keeps_no_directions_that_it_leaves_out():
    made = LowRankKeys.from_gram(gram_of(make_keys(1, 90, 64, torch.float32)), rank=40)
    basis = made.state()["basis"]
    assert basis.untyped_storage().nbytes() == basis.nbytes == 4 * 64 * 40


def output_error(keys, rebuilt, values, queries, turn):
    def attended(k):
        scores = queries.double() @ turn(k).double().repeat_interleave(2, 0).mT * 0.125
        return scores.softmax(-1) @ values.double().repeat_interleave(2, 0)

    return float((attended(rebuilt) - attended(keys)).norm() / attended(keys).norm())


@pytest.mark.parametrize("rotated", [False, True])
def test_the_rank_is_chosen_by_the_output_of_attention(rotated):
    keys, values = make_keys(2, 300, 64), make_keys(2, 300, 64, seed=5)
    queries = make_query(4 * 10, 64).reshape(4, 10, 64)

    def turn(x):
        return rotate(x, range(300)) if rotated else x

    ranks = [128, 8, 32, 64]
    how = dict(ranks=ranks, scale=0.125, rotate=turn, dtype=torch.float32)
    errors = {
        rank: output_error(keys, every_row(low_rank(keys, rank=rank), 2), values, queries, turn)
        for rank in sorted(ranks)
    }
    assert errors[8] > errors[32] > errors[64] > errors[128]
    for rank in (8, 32, 64):
        just = errors[rank] * 1.001
        chosen = choose_rank(gram_of(keys), keys, values, queries, tolerance=just, **how)
        assert chosen.rank == rank
        assert chosen.error == pytest.approx(errors[rank], rel=1e-3)
    strict = choose_rank(gram_of(keys), keys, values, queries, tolerance=0.0, **how)
    assert strict.rank == 128
    assert strict.error < 1e-4


def test_energy_misleads_where_queries_look_at_what_is_small():
    keys, values = make_keys(1, 300, 64), make_keys(1, 300, 64, seed=5)
    energetic = low_rank(keys, energy=0.98).rank
    faint = LowRankKeys.from_gram(gram_of(keys), rank=64).state()["basis"][0, -8:]
    queries = 60 * faint[None]  # along directions of the least energy
    how = dict(ranks=[energetic, 64], tolerance=0.05, scale=0.125, dtype=torch.float32)
    chosen = choose_rank(gram_of(keys), keys, values, queries, **how)
    assert energetic < chosen.rank == 64


def test_what_cannot_be_is_said():
    gram = gram_of(make_keys(2, 30, 64))
    for how in ({}, {"rank": 3, "energy": 0.5}):
        with pytest.raises(ValueError, match="rank or energy"):
            LowRankKeys.from_gram(gram, **how)
    with pytest.raises(ValueError, match="at least 1"):
        LowRankKeys.from_gram(gram, rank=0)
    with pytest.raises(ValueError, match=r"energy must be in \(0, 1\]"):
        LowRankKeys.from_gram(gram, energy=1.5)
    with pytest.raises(ValueError, match="at least one key"):
        LowRankKeys.from_gram(Gram(2, 64), rank=3)
    keys = make_keys(2, 30, 64)
    with pytest.raises(ValueError, match="at least one rank"):
        choose_rank(gram, keys, keys, keys, ranks=[], tolerance=0.1, scale=1.0)
