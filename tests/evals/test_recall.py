"""Recall by definition: what a selection keeps of attention, counted twice."""

import pytest
import torch

from engine.method import Method
from engine.model.pieces import Shape
from engine.sparse.indexes import make_index
from evals.fixtures import Size, make_fixture
from evals.recall import Rows, attended, fill, mass, recall, truths, union
from evals.trace import Trace
from retrieval.exact import Exact
from retrieval.landmarks import Landmarks
from retrieval.scalar import ScalarIndex
from retrieval.vq import VQIndex
from tests.evals.make import make_trace

INDEXES = ["exact", "landmarks", "quest", "vq", "pq", "scalar"]


def built(name, trace, budget=1000, **options):
    heads, length, dim = trace.values.shape
    group = trace.rotated.queries.shape[1]
    shape = Shape(1, group, heads, dim, 1, length, trace.values.dtype, torch.device("cpu"))
    index = make_index(Method(index=name, options=options), shape, budget)
    fill(index, trace, calibrated=False)
    return index


def asked(index, trace, share, **rows):
    return recall(index, trace, truths(trace, share), **rows)


def test_the_oracle_takes_the_most_attention_of_any_choice_when_groups_have_one_head():
    trace = make_trace(tokens=60, kv_heads=1, group=1, queries=1)
    [truth] = truths(trace, 0.5, sinks=0, window=1)
    scores = trace.rotated.queries[0] @ trace.rotated.keys[0].mT * trace.scale
    probs = scores.softmax(-1)[0]
    torch.testing.assert_close(truth.probs[0], probs)
    rest = probs[:-1].sort(descending=True).values[:29].sum() + probs[-1]
    torch.testing.assert_close(mass(truth.probs, truth.tokens)[0], rest)


def test_the_exact_index_is_the_oracle():
    trace = make_trace()
    found = asked(built("exact", trace), trace, 0.1)
    torch.testing.assert_close(found.mass, torch.ones_like(found.mass))
    assert bool((found.error > 0).all())


@pytest.mark.parametrize("name", INDEXES)
def test_at_full_budget_every_index_finds_everything(name):
    trace = make_trace()
    options = {"outlier_chunks": 0} if name == "landmarks" else {}
    found = asked(built(name, trace, **options), trace, 1.0)
    torch.testing.assert_close(found.mass, torch.ones_like(found.mass))
    assert float(found.error.max()) < 1e-4
    assert found.fetched.tolist() == found.union.tolist() == [[n] * 2 for n in trace.asked]


@pytest.mark.parametrize("name", INDEXES)
def test_every_index_fetches_exactly_the_budget_of_its_query(name):
    trace = make_fixture("drift", 0, Size(tokens=3000, head_dim=64, queries=4))
    found = asked(built(name, trace, budget=round(0.02 * trace.asked[0])), trace, 0.02)
    assert found.fetched[:, 0].tolist() == [round(0.02 * n) for n in trace.asked]
    assert bool((found.union >= found.fetched).all())
    assert bool((found.mass <= 1.2).all())


def test_the_error_is_that_of_attention_over_the_chosen_tokens_only():
    trace = make_trace(queries=1)
    index = built("scalar", trace, bits=1)
    [truth] = truths(trace, 0.1)
    found = recall(index, trace, [truth])
    tokens = index.search(trace.rotated.queries[0], truth.policy, trace.scale)
    for head in range(4):
        own, q = tokens[head // 2], trace.rotated.queries[0, head]
        keys, values = (x[head // 2] for x in (trace.rotated.keys, trace.values))
        got = (keys[own] @ q * trace.scale).softmax(0) @ values[own]
        want = (keys @ q * trace.scale).softmax(0) @ values
        rows = Rows(trace.rotated.keys, trace.values)
        all_heads = attended(trace.rotated.queries[0], rows, tokens, trace.scale)
        torch.testing.assert_close(all_heads[head], got)
        torch.testing.assert_close(truth.out[head], want)
    error = (all_heads - truth.out).norm(dim=-1) / truth.out.norm(dim=-1)
    torch.testing.assert_close(found.error[0], error.view(2, 2).mean(1))


def test_other_rows_change_the_error_and_not_the_mass():
    trace = make_trace()
    rows = Rows(trace.rotated.keys, torch.zeros_like(trace.values))
    plain = asked(built("scalar", trace), trace, 0.1)
    other = asked(built("scalar", trace), trace, 0.1, attended_rows=rows)
    assert torch.equal(plain.mass, other.mass)
    torch.testing.assert_close(other.error, torch.ones_like(other.error))


def test_a_union_counts_a_token_once_in_each_group():
    tokens = torch.tensor([[0, 1, 2], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    assert union(tokens, 2).tolist() == [4, 3]
    assert union(tokens, 4).tolist() == [3, 3, 3, 3]


def test_tokens_after_a_question_are_not_in_the_index_yet():
    trace = make_trace(queries=5)
    index = built("exact", trace)
    assert index.length == trace.prompt == 295
    asked(index, trace, 0.1)
    assert index.length == 300
    with pytest.raises(ValueError, match="fill a new one"):
        asked(index, trace, 0.1)


def test_windowed_indexes_get_the_windowed_keys_queries_and_calibration():
    trace = make_trace()
    other = make_trace(seed=9).rotated
    mixed = Trace(
        trace.rotated, other, trace.values, trace.asked, trace.prompt, trace.scale, trace.rope
    )
    index = VQIndex(2, 64, centroids=512)  # as many as tokens: exact
    fill(index, mixed, calibrated=True)
    torch.testing.assert_close(
        index.score(other.queries[0]),
        (other.queries[0].view(2, 2, 64) @ other.keys[:, :296].mT).view(4, -1)[:, : index.length],
        rtol=1e-3,
        atol=1e-3,
    )
    assert float(recall(index, mixed, truths(mixed, 0.1)).mass.mean()) < 0.8


def test_an_index_that_does_not_learn_from_queries_is_not_calibrated():
    with pytest.raises(ValueError, match="Exact"):
        fill(Exact(2, 64), make_trace(), calibrated=True)


def test_bytes_are_those_that_the_index_holds():
    trace = make_trace(queries=1)
    found = asked(built("exact", trace), trace, 0.1)
    assert 64 * 4 <= found.nbytes <= 64 * 4 * 1.5
    scalar = ScalarIndex(2, 64)
    fill(scalar, trace, calibrated=False)
    shared = scalar.spec.shared_bytes / 300
    assert asked(scalar, trace, 0.1).nbytes < 22 + shared


def test_landmarks_miss_scattered_evidence_that_token_codes_find():
    """Mean keys say little of one key in eight; the bench has the numbers."""
    for kind, low, high in (("scattered", 0.1, 0.6), ("clustered", 0.8, 1.0)):
        trace = make_fixture(kind, 0, Size(queries=6))
        truth = truths(trace, 0.02)
        landmarks = Landmarks(1, 128, torch.bfloat16, outlier_chunks=6)
        codes = ScalarIndex(1, 128, torch.bfloat16)
        for index in (landmarks, codes):
            fill(index, trace, calibrated=False)
        assert low < float(recall(landmarks, trace, truth).mass.mean()) < high
        assert float(recall(codes, trace, truth).mass.mean()) > 0.99


def test_lengths_that_contradict_each_other_are_refused():
    trace = make_trace()
    for asked_at, prompt in (((300, 299, 298, 297), 290), ((297, 298, 299, 300), 298)):
        with pytest.raises(ValueError, match="one length a query"):
            Trace(trace.rotated, trace.windowed, trace.values, asked_at, prompt, 1.0)
    with pytest.raises(ValueError, match="rotated and windowed"):
        trace.space("unrotated")
