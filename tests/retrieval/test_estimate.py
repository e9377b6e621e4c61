"""The estimate of what is not selected: by its definition, and no token counts twice."""

import math

import pytest
import torch

from engine.attention import merge
from engine.kernels.attend_token import Partial
from retrieval.estimate import Tail
from tests.retrieval.keys import (
    DTYPES,
    LENGTHS,
    SHAPES,
    make_keys,
    make_query,
    others,
    selected_ids,
)


def rows(x, ids):
    return x[torch.arange(len(x))[:, None], ids]


def attended(query, keys, values, scale):
    """Attention by definition, in double precision."""
    folded = query.double().unflatten(0, (len(keys), -1))
    logits = folded @ keys.double().mT * scale
    out = logits.softmax(-1) @ values.double()
    return Partial(out.flatten(0, 1).float(), logits.logsumexp(-1).flatten().float())


def made(keys, values, cluster, cuts=()):
    tail = Tail(len(keys), keys.shape[2], cluster_tokens=cluster)
    ends = [*cuts, keys.shape[1]]
    for start, stop in zip([0, *ends], ends):
        tail.append(keys[:, start:stop], values[:, start:stop])
    return tail


def case(shape, length, dtype=torch.float32, seed=0):
    heads, group, dim = shape
    keys = make_keys(heads, length, dim, dtype, seed)
    values = make_keys(heads, length, dim, dtype, seed + 50)
    return make_query(heads * group, dim, dtype, seed + 1), keys, values, 0.5 / dim**0.5


def estimated(tail, query, ids, keys, values, scale):
    return tail.estimate(query, ids, rows(keys, ids), rows(values, ids), scale)


def merged(tail, query, ids, keys, values, scale):
    exact = attended(query, rows(keys, ids), rows(values, ids), scale)
    return merge([exact, Partial(*estimated(tail, query, ids, keys, values, scale))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_of_one_token_are_exact_and_merge_to_dense_attention(shape, length, dtype):
    query, keys, values, scale = case(shape, length, dtype)
    tail = made(keys, values, 1)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    dense = attended(query, keys, values, scale)
    for count in {0, 1, length // 3, length - 1} - {length}:
        ids = selected_ids(shape[0], count, length)
        rest = others(ids, length)
        want = attended(query, rows(keys, rest), rows(values, rest), scale)
        got = estimated(tail, query, ids, keys, values, scale)
        assert got.out.dtype == dtype
        torch.testing.assert_close(got.out.float(), want.out, **close)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-4)
        if count:
            both = merged(tail, query, ids, keys, values, scale)
            torch.testing.assert_close(both.out.float(), dense.out, **close)
            torch.testing.assert_close(both.lse, dense.lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("cluster", [1, 16, 32])
def test_if_everything_is_selected_nothing_is_added(cluster, length, dtype):
    query, keys, values, scale = case((2, 4, 128), length, dtype)
    ids = torch.arange(length).expand(2, -1)
    tail = made(keys, values, cluster)
    got = estimated(tail, query, ids, keys, values, scale)
    assert got.lse.isneginf().all()
    assert (got.out == 0).all()
    exact = attended(query, keys, values, scale)
    both = merge([exact, Partial(*got)])
    assert torch.equal(both.out, exact.out)
    assert torch.equal(both.lse, exact.lse)


@pytest.mark.parametrize("shape", SHAPES)
def test_selected_tokens_are_taken_out_and_the_others_count_once(shape):
    """Values that are 1 sum up to the weights; keys that are alike make every weight known."""
    heads, group, dim = shape
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(heads, 10, dim, generator=generator)
    keys = kinds.repeat_interleave(32, 1)[:, :300]  # in a cluster all alike: no approximation
    values = torch.randn(heads, 300, dim, generator=generator)
    query, scale = make_query(heads * group, dim), dim**-0.5
    tail = made(keys, values, 32)
    for count in (1, 40, 150, 290, 299):
        ids = selected_ids(heads, count, 300, seed=count)
        rest = others(ids, 300)
        want = attended(query, rows(keys, rest), rows(values, rest), scale)
        got = estimated(tail, query, ids, keys, values, scale)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.out, want.out, rtol=1e-4, atol=1e-4)


def by_definition(query, ids, keys, values, scale, cluster):
    """A loop over heads and clusters, in double precision."""
    group, outs, lses = len(query) // len(keys), [], []
    for head, q in enumerate(query.double()):
        k, v = keys[head // group].double(), values[head // group].double()
        taken, found = set(ids[head // group].tolist()), []
        for start in range(0, len(k), cluster):
            run = range(start, min(start + cluster, len(k)))
            rest = [t for t in run if t not in taken]
            if rest:
                spread = float(k[list(run)].var(0, correction=0).mean())
                wider = min(2.0, spread * float(q @ q) * scale**2 / 2)
                logit = float(k[rest].mean(0) @ q) * scale + wider + math.log(len(rest))
                found.append((logit, v[rest].mean(0)))
        logits = torch.tensor([logit for logit, _ in found], dtype=torch.float64)
        outs.append(logits.softmax(0) @ torch.stack([mean for _, mean in found]))
        lses.append(logits.logsumexp(0))
    return torch.stack(outs).float(), torch.stack(lses).float()


@pytest.mark.parametrize("cluster", [1, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_its_definition_says(shape, length, dtype, cluster):
    query, keys, values, scale = case(shape, length, dtype)
    tail = made(keys, values, cluster)
    for count in {0, length // 10, length - 2} - {-1}:
        ids = selected_ids(shape[0], count, length)
        out, lse = by_definition(query, ids, keys, values, scale, cluster)
        got = estimated(tail, query, ids, keys, values, scale)
        assert got.out.dtype == dtype
        close = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.out.float(), out, rtol=close, atol=close)
        torch.testing.assert_close(got.lse, lse, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_selected_tokens_does_not_matter():
    query, keys, values, scale = case((2, 4, 64), 300)
    tail, ids = made(keys, values, 32), selected_ids(2, 40, 300)
    want = estimated(tail, query, ids, keys, values, scale)
    got = estimated(tail, query, ids.flip(1), keys, values, scale)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cluster", [1, 16, 32])
def test_tokens_may_come_in_any_cut_and_generated_ones_after_the_prompt(cluster):
    query, keys, values, scale = case((2, 4, 64), 300)
    ids = selected_ids(2, 40, 300)
    whole = made(keys, values, cluster)
    want = estimated(whole, query, ids, keys, values, scale)
    for cuts in ([1], [127, 128, 129], range(200, 300), range(1, 300)):
        tail = made(keys, values, cluster, cuts)
        assert tail.length == 300
        got = estimated(tail, query, ids, keys, values, scale)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_token_just_appended_counts():
    query, keys, values, scale = case((2, 4, 64), 129)
    ids = torch.arange(128).expand(2, -1)
    got = estimated(made(keys, values, 32, [128]), query, ids, keys, values, scale)
    want = attended(query, keys[:, 128:], values[:, 128:], scale)
    torch.testing.assert_close(got, type(got)(*want), rtol=1e-4, atol=1e-4)


def flat_head(seed, spread, length=4096, heads=2, group=4, dim=64):
    """Attention that is spread over all tokens, in topics of 64; `spread` 0.3 is nearly even."""
    generator = torch.Generator().manual_seed(seed)

    def topics():
        shared = torch.randn(heads, length // 64, dim, generator=generator)
        own = torch.randn(heads, length, dim, generator=generator)
        return 0.7 * (shared.repeat_interleave(64, 1) + own)

    query = spread * torch.randn(heads * group, dim, generator=generator)
    return query, topics(), topics(), dim**-0.5


def errors(seed, spread, cluster, budget=82):
    """Relative error of the output without the estimate, and with it."""
    query, keys, values, scale = flat_head(seed, spread)
    dense = attended(query, keys, values, scale).out
    logits = (query.unflatten(0, (len(keys), -1)) @ keys.mT * scale).log_softmax(-1)
    ids = logits.amax(1).topk(budget, -1).indices.sort(-1).values
    exact = attended(query, rows(keys, ids), rows(values, ids), scale).out
    both = merged(made(keys, values, cluster), query, ids, keys, values, scale).out
    return [float((x - dense).norm() / dense.norm()) for x in (exact, both)]


@pytest.mark.parametrize(("spread", "least", "most"), [(0.3, 0.5, 0.03), (1.0, 0.5, 0.1)])
def test_it_takes_most_of_the_error_of_flat_heads(spread, least, most):
    """2 % of the tokens, which hold 3 and 7 % of the attention."""
    for seed in range(4):
        without, with_it = errors(seed, spread, 32)
        assert without > least
        assert with_it < most


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_smaller_clusters_are_no_worse(spread):
    found = [sum(errors(seed, spread, c)[1] for seed in range(4)) for c in (1, 16, 256)]
    assert found[0] < 1e-5 < found[1] <= found[2]


def test_one_strange_key_does_not_make_its_cluster_take_all_attention():
    query, keys, values, scale = case((1, 2, 64), 256)
    strange = torch.randn(64, generator=torch.Generator().manual_seed(3))
    keys[:, 100] = 300 * strange / strange.norm()
    ids = torch.tensor([[100]])
    want = attended(query, rows(keys, others(ids, 256)), rows(values, others(ids, 256)), scale)
    got = estimated(made(keys, values, 32), query, ids, keys, values, scale)
    assert (got.lse - want.lse).abs().max() < 1.0


def test_scores_are_capped_as_the_models_are():
    query, keys, values, scale = case((2, 4, 64), 300)
    tail, ids = Tail(2, 64, cluster_tokens=1, softcap=0.5), selected_ids(2, 40, 300)
    tail.append(keys, values)
    got, rest = estimated(tail, query, ids, keys, values, scale), others(ids, 300)
    folded = query.double().unflatten(0, (2, -1)) @ rows(keys, rest).double().mT * scale
    logits = 0.5 * torch.tanh(folded / 0.5)
    out = logits.softmax(-1) @ rows(values, rest).double()
    torch.testing.assert_close(got.out.double(), out.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.lse.double(), logits.logsumexp(-1).flatten(), rtol=1e-5, atol=1e-5
    )


def test_memory_is_two_rows_and_a_number_a_cluster():
    _, keys, values, _ = case((2, 1, 64), 4096, torch.bfloat16)
    tail = made(keys, values, 32)
    assert tail.nbytes == 2 * 4096 // 32 * (8 * 64 + 4)


def test_a_cluster_of_nothing_is_named():
    with pytest.raises(ValueError, match="need cluster_tokens >= 1, got 0"):
        Tail(2, 64, cluster_tokens=0)
