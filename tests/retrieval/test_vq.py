"""Vector quantization: exact where it can be, guarded where it cannot."""

import sys

import pytest
import torch

from retrieval.codebook import Codebook, train_codebook
from retrieval.index import KVIndex, NotRelocatable
from retrieval.metric import Metric
from retrieval.select import Policy, top_tokens
from retrieval.vq import Guard, VQIndex
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

NO_GUARD = Guard(tokens=0)


def queries_like(query, n=50, seed=7):
    """Queries that are all but the same direction, as those of one head often are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(query), n, query.shape[1], generator=generator)
    return (query.float()[:, None] * 3 + 0.3 * noise).to(query.dtype)


def decoded(index, keys):
    """Keys as their code says, by brute force."""
    metric = index.codebook.metric
    z, book = metric.keys(keys), index.codebook.centroids[:, 0]
    near = torch.stack([b[torch.cdist(x[None], b[None])[0].argmin(1)] for x, b in zip(z, book)])
    return (near if metric.inverse is None else near @ metric.inverse) + metric.mean[:, None]


def assert_close(scores, query, keys, atol=1e-4):
    want = plain_scores(query, keys)
    error = (scores.double() - want).abs().max()
    assert error <= atol * want.abs().max().clamp_min(1), error


@pytest.mark.parametrize(("hk", "g", "d"), SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "query-aware"])
def test_as_many_centroids_as_distinct_keys_make_scores_exact(hk, g, d, length, dtype, aware):
    keys, query = make_keys(hk, length, d, dtype), make_query(hk * g, d, dtype)
    index = VQIndex(hk, d, dtype, centroids=300, guard=NO_GUARD)
    if aware:
        index.calibrate(queries_like(query))
    fill(index, keys, (), length)
    assert_close(index.score(query), query, keys)
    assert index.length == length
    assert isinstance(index, KVIndex)


def test_repeated_keys_need_no_more_centroids_and_the_later_token_wins():
    keys = make_keys(2, 10, 64).repeat(1, 30, 1)
    query = make_query(4, 64)
    index = fill(VQIndex(2, 64, centroids=16, guard=NO_GUARD), keys, (), 300)
    assert_close(index.score(query), query, keys)
    policy = Policy(budget=40, sinks=0, window=1)
    taken = top_tokens(index.score(query), policy, num_kv_heads=2, length=300, scale=0.1)
    best = plain_scores(query, keys[:, :10]).log_softmax(-1).unflatten(0, (2, 2)).amax(1).argmax(1)
    for own, first in zip(taken, best):  # all 30 tokens of the best key, the rest of others
        assert set(range(int(first), 300, 10)) <= set(own.tolist()) | {299}


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "query-aware"])
@pytest.mark.parametrize(("hk", "g", "d"), SHAPES)
def test_a_score_is_that_of_the_nearest_centroid_in_the_metric(hk, g, d, aware):
    keys, query = make_keys(hk, 300, d), make_query(hk * g, d)
    index = VQIndex(hk, d, centroids=20, guard=NO_GUARD)
    if aware:
        index.calibrate(queries_like(query))
    fill(index, keys, (), 300)
    assert_close(index.score(query), query, decoded(index, keys))
    assert not torch.allclose(index.score(query).double(), plain_scores(query, keys), rtol=1e-2)


def test_queries_without_a_favourite_direction_give_the_codes_of_plain_vq():
    keys = make_keys(2, 300, 64)
    plain = fill(VQIndex(2, 64, centroids=20), keys, (), 300)
    alike = VQIndex(2, 64, centroids=20)
    alike.calibrate((5 * torch.eye(64)).expand(4, 64, 64))
    fill(alike, keys, (), 300)
    assert torch.equal(alike.state()["codes"], plain.state()["codes"])


def test_a_codebook_that_knows_the_queries_scores_them_better():
    keys, query = make_keys(2, 2000, 64), make_query(8, 64)
    errors = {}
    for aware in (False, True):
        index = VQIndex(2, 64, centroids=64, guard=NO_GUARD)
        if aware:
            index.calibrate(queries_like(query))
        fill(index, keys, (), 2000)
        off = index.score(query).double() - plain_scores(query, keys)
        errors[aware] = float(off.square().mean())
    assert errors[True] < 0.7 * errors[False], errors


def test_scores_are_exact_until_the_prompt_is_complete():
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    index = VQIndex(2, 64, centroids=4)
    for run in keys.split(70, 1):
        index.append(run)
        assert_close(index.score(query), query, keys[:, : index.length])


@pytest.mark.parametrize("cuts", [(1,), (127, 128), (50, 100, 150, 200, 220, 299)])
def test_a_prompt_in_pieces_is_the_prompt_and_later_tokens_are_coded(cuts):
    keys, query = make_keys(2, 300, 64, torch.bfloat16), make_query(4, 64, torch.bfloat16)
    whole = fill(VQIndex(2, 64, torch.bfloat16, centroids=20), keys, (), 200)
    parts = fill(VQIndex(2, 64, torch.bfloat16, centroids=20), keys, cuts, 200)
    assert torch.equal(whole.score(query), parts.score(query))
    assert whole.length == 300
    unguarded = VQIndex(2, 64, torch.bfloat16, centroids=20, guard=NO_GUARD)
    fill(unguarded, keys, (), 200)
    assert_close(unguarded.score(query), query, decoded(unguarded, keys))


@pytest.mark.parametrize("prompt", [300, 200, None], ids=["final", "with later tokens", "waiting"])
@pytest.mark.parametrize("given", [False, True])
def test_its_state_is_the_index(prompt, given):
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    book = train_codebook(keys, Metric(keys.mean(1), None, None), centroids=30) if given else None
    index = VQIndex(
        2,
        64,
        centroids=20,
        codebook=book,
        guard=Guard(0.3, 0.9, 5),
        key_space="unrotated",
        ridge=0.1,
        seed=3,
    )
    index.calibrate(queries_like(query))
    if prompt:
        fill(index, keys, (100,), prompt)
    else:
        index.append(keys)
    again = VQIndex.from_state(through_bytes(index.state()))
    assert again.spec == index.spec
    assert again.stats == index.stats
    for each in (index, again):
        if not prompt:
            each.finalize()
        each.append(keys[:, :50])
    assert torch.equal(again.score(query), index.score(query))
    assert (again.length, again.stats, again.spec) == (350, index.stats, index.spec)


def test_moving_costs_nothing_and_leaves_the_index_as_it_is():
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    index = fill(VQIndex(2, 64, centroids=20), keys, (), 300)
    before = index.score(query)
    moved = index.relocate(1000, turn_by(1000))
    moved.append(keys[:, :9])
    assert torch.equal(moved.score(query)[:, :300], before)
    assert torch.equal(index.score(query), before)
    rotated = rotate(keys, range(300))
    fixed = fill(VQIndex(2, 64, centroids=20, key_space="rotated"), rotated, (), 300)
    assert (index.spec.relocatable, fixed.spec.relocatable) == ("free", "rebuild")
    with pytest.raises(NotRelocatable, match="windowed"):
        fixed.relocate(5, turn_by(5))


def test_badly_coded_keys_are_scored_exactly_the_worst_first():
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    for tokens in (0, 3, 300):
        index = fill(VQIndex(2, 64, centroids=8, guard=Guard(0.0, 1.0, tokens)), keys, (), 300)
        off = (index.score(query).double() - plain_scores(query, keys)).abs()
        exact = off.unflatten(0, (2, 2)).amax(1) < 1e-4  # [Hk, T]
        assert index.stats.exact_tokens == tokens
        assert (exact.sum(1) >= tokens).all()
        z = index.codebook.encode(keys).errors
        for own, error in zip(exact, z):
            assert own[error.topk(tokens).indices].all()
        assert index.outliers.shape == (2, 0)


def offline(keys, centroids=64):
    return train_codebook(keys, Metric(keys.mean(1), None, None), centroids=centroids)


def test_a_codebook_made_before_needs_no_training_and_no_faiss(monkeypatch):
    keys, query = make_keys(2, 600, 64), make_query(4, 64)
    book, own = offline(keys[:, ::2]), keys[:, 1::2]
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = VQIndex(2, 64, codebook=book, guard=Guard(1.0, 0.2, 0))
    fill(index, own, (), 250)
    assert index.codebook is book
    assert (index.stats.own_codebook, index.stats.refused) == (False, False)
    assert_close(index.score(query), query, decoded(index, own))
    with pytest.raises(ImportError, match="headrace"):
        fill(VQIndex(2, 64, centroids=20), own, (), 300)


def test_a_codebook_of_other_keys_is_refused_and_that_is_said():
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    strangers = make_keys(2, 1000, 64, seed=50) * 0.3 + 40
    refusing = fill(VQIndex(2, 64, centroids=64, codebook=offline(strangers)), keys, (), 300)
    own = fill(VQIndex(2, 64, centroids=64), keys, (), 300)
    assert (refusing.stats.own_codebook, refusing.stats.refused) == (True, True)
    assert not own.stats.refused
    torch.testing.assert_close(refusing.score(query), own.score(query))
    guard = Guard(share=1.0, tokens=0)
    keeping = VQIndex(2, 64, codebook=offline(strangers), guard=guard)
    fill(keeping, keys, (), 300)
    assert not keeping.stats.own_codebook
    assert keeping.stats.bad_share == 1.0
    assert keeping.stats.error > 10 * own.stats.error


def test_a_codebook_of_other_keys_keeps_its_metric_when_it_is_refused():
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    aware = VQIndex(2, 64, centroids=20)
    aware.calibrate(queries_like(query))
    fill(aware, keys + 100, (), 300)
    index = VQIndex(2, 64, centroids=20, codebook=aware.codebook)
    fill(index, keys, (), 300)
    assert index.stats.refused
    assert torch.equal(index.codebook.metric.factor, aware.codebook.metric.factor)
    torch.testing.assert_close(index.codebook.metric.mean, keys.mean(1))


@pytest.mark.parametrize(("centroids", "width"), [(256, 1), (257, 2)])
def test_it_takes_the_bytes_it_declares(centroids, width):
    keys = make_keys(2, 1000, 64, torch.bfloat16)
    index = fill(VQIndex(2, 64, torch.bfloat16, centroids=centroids), keys, (), 1000)
    assert index.spec.bytes_per_token == width
    assert index.nbytes == 2 * (1000 * width + index.spec.shared_bytes)
    assert index.spec.shared_bytes >= 4 * 64 * centroids
    index.append(keys[:, :1])
    assert index.nbytes > 2 * (1000 * width + index.spec.shared_bytes)


def test_codes_beyond_a_byte_are_not_cut():
    keys, query = make_keys(1, 3000, 64), make_query(1, 64)
    index = fill(VQIndex(1, 64, centroids=3000), keys, (), 3000)
    assert_close(index.score(query), query, keys)


def test_what_cannot_be_is_said():
    keys = make_keys(2, 30, 64)
    with pytest.raises(ValueError, match="centroids must be in"):
        VQIndex(2, 64, centroids=40_000)
    with pytest.raises(ValueError, match="must not be negative"):
        Guard(tokens=-1)
    with pytest.raises(ValueError, match="the codebook is for"):
        VQIndex(4, 64, codebook=offline(keys))
    with pytest.raises(ValueError, match="at least one key"):
        VQIndex(2, 64).finalize()
    index = fill(VQIndex(2, 64), keys, (), 30)
    for late in (index.finalize, lambda: index.calibrate(keys)):
        with pytest.raises(RuntimeError, match="final"):
            late()
    empty = VQIndex(2, 64, codebook=offline(keys))
    empty.finalize()
    assert empty.score(make_query(4, 64)).shape == (4, 0)
    assert isinstance(empty.codebook, Codebook)
