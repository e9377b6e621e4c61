"""Product quantization with 8 and 4 bits, against brute force and where it is exact."""

import sys

import pytest
import torch

from retrieval.codebook import train_codebook
from retrieval.index import KVIndex, NotRelocatable
from retrieval.metric import Metric
from retrieval.pq import PQIndex, summed
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

BITS = [8, 4]


def queries_like(query, n=50):
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(len(query), n, query.shape[1], generator=generator)
    return (query.float()[:, None] * 3 + 0.3 * noise).to(query.dtype)


def decoded(index, keys):
    """Keys as their codes say, by brute force."""
    book, metric = index.codebook.centroids, index.codebook.metric
    parts = metric.keys(keys).unflatten(-1, (book.shape[1], -1)).transpose(1, 2)
    near = torch.cdist(parts, book).argmin(-1)  # [Hk, M, N]
    coded = torch.stack([torch.cat([b[i] for b, i in zip(*x)], -1) for x in zip(book, near)])
    return (coded if metric.inverse is None else coded @ metric.inverse) + metric.mean[:, None]


def rounding(index, query):
    """How far the rounding of tables to bytes may move a score: half a step per sub-space."""
    if index.spec.bytes_per_token >= index.codebook.centroids.shape[1]:
        return 0.0  # 8 bits: tables stay in fp32
    table = index.codebook.table(query).flatten(0, 1)
    step = (table.amax(-1) - table.amin(-1)).max() / 255
    return float(step) * (table.shape[1] / 2)


def assert_close(scores, query, keys, atol=0.0):
    want = plain_scores(query, keys)
    error = (scores.double() - want).abs().max()
    assert error <= atol + 1e-4 * want.abs().max().clamp_min(1), (error, atol)


@pytest.mark.parametrize(("hk", "g", "d"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "query-aware"])
def test_as_many_centroids_as_distinct_keys_make_scores_exact(hk, g, d, bits, dtype, aware):
    for length in LENGTHS:
        keys = make_keys(hk, min(length, 1 << bits), d, dtype).repeat(1, 20, 1)[:, :length]
        query = make_query(hk * g, d, dtype)
        index = PQIndex(hk, d, dtype, bits=bits)
        if aware:
            index.calibrate(queries_like(query))
        fill(index, keys, (), length)
        assert_close(index.score(query), query, keys, rounding(index, query))
        assert index.length == length
        assert isinstance(index, KVIndex)


@pytest.mark.parametrize(("hk", "g", "d"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("subspaces", [1, 8, 16])
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "query-aware"])
def test_a_score_is_that_of_the_coded_key(hk, g, d, bits, subspaces, aware):
    keys, query = make_keys(hk, 600, d), make_query(hk * g, d)
    index = PQIndex(hk, d, bits=bits, subspaces=subspaces, iterations=2)
    if aware:
        index.calibrate(queries_like(query))
    fill(index, keys, (), 600)
    assert_close(index.score(query), query, decoded(index, keys), rounding(index, query))


def test_codes_that_no_key_has_do_not_coarsen_the_table():
    keys, query = make_keys(2, 9, 64).repeat(1, 10, 1) + 1000, make_query(4, 64).abs()
    index = fill(PQIndex(2, 64, bits=4), keys, (), 90)
    off = (index.score(query).double() - plain_scores(query, keys)).abs().max()
    assert off <= rounding(index, query) + 0.1  # fp32 at 50,000 has steps of 0.004


def test_a_dimension_to_itself_with_256_values_is_exact():
    keys, query = make_keys(2, 3000, 64).mul(8).round().clamp(-120, 120) / 8, make_query(4, 64)
    index = fill(PQIndex(2, 64, subspaces=64), keys, (), 3000)
    assert_close(index.score(query), query, keys)


def test_more_bytes_make_smaller_errors_and_queries_help():
    keys, query = make_keys(2, 2000, 64), make_query(8, 64)

    def error(aware=False, **settings):
        index = PQIndex(2, 64, **settings)
        if aware:
            index.calibrate(queries_like(query))
        fill(index, keys, (), 2000)
        return (index.score(query).double() - plain_scores(query, keys)).square().mean()

    assert error(subspaces=32) < 0.5 * error(subspaces=16) < 0.3 * error(subspaces=4)
    assert error(subspaces=16) < 0.5 * error(subspaces=16, bits=4)
    assert error(subspaces=4, aware=True) < 0.7 * error(subspaces=4)


@pytest.mark.parametrize("bits", BITS)
def test_search_is_what_the_policy_takes_of_the_scores(bits):
    keys, query = make_keys(2, 1000, 64), make_query(8, 64)
    index = PQIndex(2, 64, bits=bits)
    index.append(keys)
    for policy in (Policy(100), Policy(100, reduce="sum"), Policy(500, top_p=0.5)):
        waiting = index.search(query, policy, 0.1)
        exact = plain_scores(query, keys).float()
        assert taken_alike(waiting, exact, policy)
    index.finalize()
    for policy in (Policy(100), Policy(100, reduce="sum"), Policy(500, top_p=0.5), Policy(2000)):
        assert taken_alike(index.search(query, policy, 0.1), index.score(query), policy)


def taken_alike(found, scores, policy):
    """All but a few, which rounding of the softmax may put in another order."""
    want = top_tokens(scores, policy, num_kv_heads=2, length=1000, scale=0.1)
    both = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, want)]
    return found.shape == want.shape and min(both) >= want.shape[1] - 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cuts", [(1,), (127, 128), (50, 100, 150, 230, 299)])
def test_a_prompt_in_pieces_is_the_prompt_and_later_tokens_are_coded(bits, cuts):
    keys, query = make_keys(2, 300, 64, torch.bfloat16), make_query(4, 64, torch.bfloat16)
    whole = PQIndex(2, 64, torch.bfloat16, bits=bits, subspaces=8)
    parts = PQIndex(2, 64, torch.bfloat16, bits=bits, subspaces=8)
    fill(whole, keys, (), 200)
    for stop in sorted({*cuts, 200}):
        if stop <= 200:
            parts.append(keys[:, parts.length : stop])
            assert_close(parts.score(query), query, keys[:, :stop])
    parts.finalize()
    for stop in sorted({*cuts, 300}):
        parts.append(keys[:, parts.length : max(stop, parts.length)])
    torch.testing.assert_close(whole.score(query), parts.score(query))
    assert_close(parts.score(query), query, decoded(parts, keys), rounding(parts, query))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("prompt", [300, 200, None], ids=["final", "with later tokens", "waiting"])
@pytest.mark.parametrize("given", [False, True])
def test_its_state_is_the_index(bits, prompt, given):
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    metric = Metric(keys.mean(1), None, None)
    book = train_codebook(keys, metric, subspaces=8, centroids=9) if given else None
    settings = dict(key_space="unrotated", iterations=2, ridge=0.1, seed=3, points=20)
    index = PQIndex(2, 64, bits=bits, subspaces=8, codebook=book, **settings)
    index.calibrate(queries_like(query))
    if prompt:
        fill(index, keys, (100,), prompt)
    else:
        index.append(keys)
    again = PQIndex.from_state(through_bytes(index.state()))
    assert again.spec == index.spec
    for each in (index, again):
        if not prompt:
            each.finalize()
        each.append(keys[:, :50])
    assert torch.equal(again.score(query), index.score(query))
    assert (again.length, again.spec) == (350, index.spec)


@pytest.mark.parametrize("bits", BITS)
def test_moving_is_free_without_positions_and_impossible_with_them(bits):
    keys, query = make_keys(2, 300, 64), make_query(4, 64)
    for space in ("unrotated", "windowed"):
        index = fill(PQIndex(2, 64, bits=bits, key_space=space), keys, (), 300)
        before = index.score(query)
        moved = index.relocate(1000, turn_by(1000))
        moved.append(keys[:, :9])
        index.append(keys[:, 9:20])
        assert torch.equal(moved.score(query)[:, :300], before)
        assert torch.equal(index.score(query)[:, :300], before)
        assert index.spec.relocatable == "free"
    fixed = fill(PQIndex(2, 64, bits=bits), rotate(keys, range(300)), (), 300)
    assert fixed.spec.relocatable == "rebuild"
    with pytest.raises(NotRelocatable, match="unrotated"):
        fixed.relocate(5, turn_by(5))


def test_a_codebook_made_before_needs_no_training_and_no_faiss(monkeypatch):
    keys, query = make_keys(2, 600, 64), make_query(4, 64)
    first = fill(PQIndex(2, 64), keys[:, ::2], (), 300)
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = fill(PQIndex(2, 64, codebook=first.codebook), keys, (), 600)
    assert index.codebook is first.codebook
    assert_close(index.score(query), query, decoded(index, keys))
    with pytest.raises(ImportError, match="headrace"):
        fill(PQIndex(2, 64), keys, (), 600)


@pytest.mark.parametrize(("bits", "per_token"), [(8, 16), (4, 8)])
def test_it_takes_the_bytes_it_declares(bits, per_token):
    keys = make_keys(2, 1024, 64, torch.bfloat16)
    index = PQIndex(2, 64, torch.bfloat16, bits=bits)
    before = index.spec
    fill(index, keys, (), 1024)
    assert before == index.spec
    assert index.spec.bytes_per_token == per_token
    assert index.nbytes == 2 * (1024 * per_token + index.spec.shared_bytes)
    assert index.outliers.shape == (2, 0)


@pytest.mark.parametrize("tokens", [1, 127, 9000])
def test_sums_of_entries_are_sums_of_lookups(tokens):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 5, 256, generator=generator)
    codes = torch.randint(0, 256, (tokens, 5), dtype=torch.uint8, generator=generator)
    want = sum(table[:, m, codes[:, m].long()].double() for m in range(5))
    torch.testing.assert_close(summed(table, codes).double(), want, rtol=0, atol=1e-5)


def test_what_cannot_be_is_said():
    keys = make_keys(2, 30, 64)
    with pytest.raises(ValueError, match="subspaces must divide the 64 dimensions"):
        PQIndex(2, 64, subspaces=10)
    book = fill(PQIndex(2, 64), keys, (), 30).codebook
    for heads, subspaces, bits in ((4, 16, 8), (2, 8, 8), (2, 16, 4)):
        with pytest.raises(ValueError, match="need a codebook of"):
            PQIndex(heads, 64, subspaces=subspaces, bits=bits, codebook=book)
    with pytest.raises(ValueError, match="at least one key"):
        PQIndex(2, 64).finalize()
    index = fill(PQIndex(2, 64), keys, (), 30)
    for late in (index.finalize, lambda: index.calibrate(keys)):
        with pytest.raises(RuntimeError, match="final"):
            late()
