"""Distances in the metric are errors of scores."""

import pytest
import torch

from retrieval.metric import Metric, Moment, make_metric

HEADS = [(1, 1, 64), (4, 2, 80), (8, 2, 128), (7, 1, 64), (4, 4, 64)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(hq, n, d):
    """Queries whose directions matter very differently."""
    return randn(hq, n, d, seed=1) * torch.logspace(1, -1, d) + 0.5


def moment_of(queries, heads):
    moment = Moment(heads, queries.shape[2])
    moment.add(queries)
    return moment.value


@pytest.mark.parametrize(("hq", "hk", "d"), HEADS)
def test_a_distance_is_the_mean_squared_error_of_scores_over_the_queries(hq, hk, d):
    queries, keys, codes = skewed(hq, 300, d), randn(hk, 20, d), randn(hk, 20, d, seed=2)
    metric = make_metric(randn(hk, d, seed=3), moment_of(queries, hk), ridge=0.0)
    own = queries.reshape(hk, -1, d).double()
    errors = ((keys - codes).double() @ own.mT).square().mean(-1)
    distances = (metric.keys(keys) - metric.keys(codes)).double().square().sum(-1)
    scale = own.square().sum(-1).mean(-1) / d  # the metric's mean diagonal is 1
    torch.testing.assert_close(distances * scale[:, None], errors, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("hq", "hk", "d"), HEADS)
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "query-aware"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_takes_nothing_from_a_score(hq, hk, d, aware, dtype):
    queries, keys = skewed(hq, 300, d).to(dtype), (randn(hk, 127, d) + 3).to(dtype)
    moment = moment_of(queries, hk) if aware else None
    metric = make_metric(keys.mean(1, dtype=torch.float32), moment)
    query = queries[:, 0]
    parts = metric.query(query) @ metric.keys(keys).mT + metric.constant(query)[..., None]
    want = (query.unflatten(0, (hk, -1)).double() @ keys.double().mT).flatten(0, 1)
    torch.testing.assert_close(
        parts.flatten(0, 1).double(), want, rtol=0, atol=1e-5 * want.abs().max().item()
    )


def test_queries_without_a_favourite_direction_give_plain_distances():
    d = 64
    metric = make_metric(torch.zeros(2, d), 7 * torch.eye(d).expand(2, d, d))
    assert torch.equal(metric.factor, torch.eye(d).expand(2, d, d))
    assert torch.equal(metric.inverse, torch.eye(d).expand(2, d, d))


def test_how_often_queries_come_and_in_which_cut_does_not_matter():
    queries, moment = skewed(4, 100, 64), Moment(2, 64)
    for part in queries.split([1, 50, 49], 1):
        moment.add(part)
    torch.testing.assert_close(moment.value, moment_of(queries, 2))
    torch.testing.assert_close(moment_of(queries.repeat(1, 3, 1), 2), moment.value)
    again = Moment.of(moment.value, moment.count)
    again.add(queries)
    torch.testing.assert_close(again.value, moment.value)


def test_a_head_is_not_moved_by_the_queries_of_another():
    queries = skewed(4, 100, 64)
    metric = make_metric(torch.zeros(2, 64), moment_of(queries, 2))
    alone = make_metric(torch.zeros(1, 64), moment_of(queries[2:], 1))
    torch.testing.assert_close(metric.head(1).factor, alone.factor)
    assert not torch.allclose(metric.factor[0], metric.factor[1], rtol=1e-2)


def test_one_query_is_enough_if_it_is_finite():
    metric = make_metric(torch.zeros(1, 64), moment_of(skewed(1, 1, 64), 1))
    assert metric.factor.isfinite().all()
    assert metric.inverse.isfinite().all()
    with pytest.raises(ValueError, match="finite queries"):
        make_metric(torch.zeros(1, 64), Moment(1, 64).value + torch.nan)


def test_a_head_whose_queries_are_all_zero_has_plain_distances():
    alive = moment_of(skewed(1, 100, 64), 1)
    metric = make_metric(torch.zeros(2, 64), torch.cat([torch.zeros(1, 64, 64), alive]))
    factor = metric.factor[0]
    torch.testing.assert_close(factor, factor[0, 0] * torch.eye(64))
    assert factor[0, 0] > 0
    torch.testing.assert_close(metric.factor[1:], make_metric(torch.zeros(1, 64), alive).factor)


def test_the_spread_of_keys_does_not_depend_on_their_mean():
    keys = randn(2, 300, 64)
    plain = Metric(torch.zeros(2, 64), None, None)
    torch.testing.assert_close(plain.spread(keys + 100), plain.spread(keys), rtol=1e-4, atol=0)
    torch.testing.assert_close(plain.spread(keys), torch.full((2,), 64.0), rtol=0.1, atol=0)
