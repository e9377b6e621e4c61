"""Which tokens are taken, against a slow and plain selection."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retrieval.select import Policy, group_scores, top_tokens


def plain_groups(scores, heads, scale, reduce):
    """Log of attention probabilities over the query heads of a KV head, in plain Python."""
    logs = []
    for row in scores:
        largest = max(row)
        total = sum(math.exp((s - largest) * scale) for s in row)
        logs.append([(s - largest) * scale - math.log(total) for s in row])
    group, found = len(scores) // heads, []
    for head in range(heads):
        columns = list(zip(*logs[head * group : (head + 1) * group]))
        if reduce == "max":
            found.append([max(c) for c in columns])
        else:
            found.append([math.log(sum(math.exp(x) for x in c) or 5e-324) for c in columns])
    return found


def plain_choice(tokens, policy, budget, outliers):
    """Ids of one head: what must be kept, then the best, of equal ones the later."""
    length = len(tokens)
    kept = {*range(min(policy.sinks, length)), *range(max(0, length - policy.window), length)}
    kept |= set(outliers)
    rest = sorted(set(range(length)) - kept, key=lambda t: (tokens[t], t), reverse=True)
    return sorted([*kept, *rest[: budget - len(kept)]])


@st.composite
def cases(draw, top_p=False):
    """Scores with many ties, a policy that fits them, and outliers that score -inf."""
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    unit, length = draw(st.sampled_from([1, 1, 4, 7])), draw(st.integers(1, 60))
    units = -(-length // unit)
    some = st.one_of(st.integers(-3, 3).map(float), st.floats(-9, 9, width=16))
    flat = draw(st.lists(some, min_size=units * heads * group, max_size=units * heads * group))
    scores = torch.tensor(flat, dtype=torch.float32).reshape(heads * group, units)
    full = length // unit
    count = 0 if top_p else draw(st.integers(0, min(3, full)))
    order = st.permutations(range(full)).map(lambda ids: sorted(ids[:count]))
    chosen = torch.tensor([draw(order) for _ in range(heads)], dtype=torch.int64)
    chosen = chosen.reshape(heads, count)
    scores.scatter_(1, chosen.repeat_interleave(group, 0), -torch.inf)
    outliers = (chosen[..., None] * unit + torch.arange(unit)).flatten(1)
    sinks, window = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    policy = Policy(
        budget=sinks + window + count * unit + draw(st.integers(0, 40)),
        sinks=sinks,
        window=window,
        reduce=draw(st.sampled_from(["max", "sum"])),
        top_p=draw(st.floats(0.01, 1)) if top_p else None,
        least=draw(st.integers(0, 30)),
    )
    settings = dict(num_kv_heads=heads, length=length, scale=draw(st.floats(0.05, 2)), unit=unit)
    return scores, policy, settings, outliers


@given(cases())
@settings(max_examples=300)
def test_it_takes_what_a_plain_selection_takes(case):
    scores, policy, where, outliers = case
    chosen = top_tokens(scores, policy, outliers=outliers, **where)
    grouped = group_scores(scores, where["num_kv_heads"], where["scale"], policy.reduce)
    tokens = grouped.repeat_interleave(where["unit"], 1)[:, : where["length"]]
    tokens = tokens.nan_to_num(nan=-torch.inf).tolist()
    budget = min(policy.budget, where["length"])
    for ids, row, forced in zip(chosen.tolist(), tokens, outliers.tolist()):
        assert ids == plain_choice(row, policy, budget, forced)
        assert len(ids) == len(set(ids)) == budget


@given(cases())
def test_group_scores_are_probabilities_of_each_query_head(case):
    scores, policy, where, _ = case
    assume(not scores.isneginf().all(-1).any())
    heads, scale = where["num_kv_heads"], where["scale"]
    got = group_scores(scores, heads, scale, policy.reduce)
    want = torch.tensor(plain_groups(scores.tolist(), heads, scale, policy.reduce))
    torch.testing.assert_close(got.exp(), want.exp(), rtol=1e-4, atol=1e-6)


@given(cases(top_p=True))
@settings(max_examples=300)
def test_top_p_holds_at_least_its_share_and_no_more_tokens_than_that_needs(case):
    scores, policy, where, _ = case
    chosen = top_tokens(scores, policy, **where)
    grouped = group_scores(scores, where["num_kv_heads"], where["scale"], policy.reduce)
    share = grouped.repeat_interleave(where["unit"], 1)[:, : where["length"]].softmax(-1)
    kept, count = policy.sinks + policy.window, chosen.shape[1]
    most, least = min(policy.budget, where["length"]), max(policy.least, kept)
    assert min(least, most) <= count <= most
    if count < most:
        assert (share.gather(1, chosen).sum(-1) >= policy.top_p - 1e-5).all()
    if count > least:
        fewer = share.sort(-1, descending=True).values[:, : count - kept - 1].sum(-1)
        assert (fewer <= policy.top_p + 1e-5).any()


@pytest.mark.parametrize("top_p", [None, 0.9, 1.0])
@pytest.mark.parametrize("budget", [30, 31, 1000])
def test_a_budget_of_all_tokens_takes_all_tokens(top_p, budget):
    scores = torch.zeros(4, 30)
    policy = Policy(budget=budget, top_p=top_p, least=1000)
    chosen = top_tokens(scores, policy, num_kv_heads=2, length=30, scale=1.0)
    assert chosen.tolist() == [list(range(30))] * 2


def test_one_token_is_taken():
    chosen = top_tokens(torch.zeros(2, 1), Policy(64), num_kv_heads=1, length=1, scale=1.0, unit=8)
    assert chosen.tolist() == [[0]]


def test_sinks_window_and_outliers_are_kept_whatever_they_score():
    scores = torch.arange(40.0).roll(20)[None].clone()
    scores[:, :3] = scores[:, -2:] = scores[:, 11] = -1e30
    policy = Policy(budget=8, sinks=3, window=2)
    chosen = top_tokens(
        scores, policy, num_kv_heads=1, length=40, scale=1.0, outliers=torch.tensor([[11]])
    )
    assert chosen.tolist() == [[0, 1, 2, 11, 18, 19, 38, 39]]


def test_the_largest_probability_finds_what_one_head_wants_and_the_sum_what_all_want():
    scores = torch.tensor([[3.5, 0, 3, 0, 0], [0, 3.5, 3, 0, 0]])
    where = dict(num_kv_heads=1, length=5, scale=1.0)
    for budget, reduce, want in ((3, "max", [0, 1, 4]), (2, "sum", [2, 4])):
        policy = Policy(budget=budget, sinks=0, window=1, reduce=reduce)
        assert top_tokens(scores, policy, **where).tolist() == [want]


def test_a_query_head_with_large_scores_does_not_decide_for_its_group():
    scores = torch.tensor([[100.0, 100.5, 101.0, 100.0], [5.0, 0.0, 0.0, 0.0]])
    policy = Policy(budget=2, sinks=0, window=1)
    chosen = top_tokens(scores, policy, num_kv_heads=1, length=4, scale=1.0)
    assert chosen.tolist() == [[0, 3]]


def test_the_scale_counts_where_heads_are_compared():
    scores = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 3.2, 3.1, 0.0]])
    policy = Policy(budget=2, sinks=0, window=1)
    for scale, first in ((1.0, 0), (10.0, 0), (0.1, 1)):
        chosen = top_tokens(scores, policy, num_kv_heads=1, length=4, scale=scale)
        assert chosen.tolist() == [[first, 3]], scale


def test_of_equal_scores_the_later_token_is_taken():
    policy = Policy(budget=5, sinks=1, window=1)
    chosen = top_tokens(torch.full((3, 20), 0.7), policy, num_kv_heads=3, length=20, scale=1.0)
    assert chosen.tolist() == [[0, 16, 17, 18, 19]] * 3


def test_a_unit_is_taken_in_part_from_its_end_so_that_the_budget_is_met():
    scores = torch.tensor([[0.0, 0.0, 5.0, 9.0, 0.0, 0.0]])  # pages of 4; the last has 2 tokens
    policy = Policy(budget=7, sinks=0, window=1)
    chosen = top_tokens(scores, policy, num_kv_heads=1, length=22, scale=1.0, unit=4)
    assert chosen.tolist() == [[10, 11, 12, 13, 14, 15, 21]]


def test_infinite_scores_and_what_is_not_a_number_decide_nothing():
    scores = torch.arange(10.0)[None].clone()
    policy = Policy(budget=4, sinks=1, window=1)
    scores[0, 5:8] = -torch.inf
    chosen = top_tokens(scores, policy, num_kv_heads=1, length=10, scale=1.0)
    assert chosen.tolist() == [[0, 4, 8, 9]]
    scores[:] = torch.nan
    chosen = top_tokens(scores, policy, num_kv_heads=1, length=10, scale=1.0)
    assert chosen.tolist() == [[0, 7, 8, 9]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(budget=64, sinks=-1), "need sinks >= 0 and window >= 1, got -1, 16"),
        (dict(budget=64, window=0), "need sinks >= 0 and window >= 1, got 4, 0"),
        (dict(budget=19), "budget 19 does not hold 4 sinks and a window of 16: raise budget"),
        (dict(budget=64, top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(budget=64, top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Policy(**settings)


def test_outliers_that_do_not_fit_the_budget_are_named():
    policy = Policy(budget=20, sinks=4, window=10)
    outliers = torch.tensor([[2, 20, 21], [20, 21, 22]])
    where = dict(num_kv_heads=2, length=50, scale=1.0)
    assert top_tokens(torch.zeros(2, 50), policy, outliers=outliers, **where).shape == (2, 20)
    outliers = torch.tensor([[2, 20, 21], [20, 21, 22]]).repeat_interleave(3, 1)
    outliers += torch.tensor([0, 7, 14]).repeat(3)
    with pytest.raises(ValueError, match=r"take 23 tokens, the budget is 20: .*lower outliers"):
        top_tokens(torch.zeros(2, 50), policy, outliers=outliers, **where)


@pytest.mark.parametrize("least", [1, 64])
def test_top_p_makes_room_for_outliers(least):
    scores = torch.zeros(2, 400)
    scores[:, 200:280] = -torch.inf
    outliers = torch.arange(200, 280).expand(2, -1)
    where = dict(num_kv_heads=2, length=400, scale=1.0, outliers=outliers)
    policy = Policy(budget=300, top_p=0.5, least=least)
    chosen = top_tokens(scores, policy, **where)
    assert (scores.softmax(-1).gather(1, chosen).sum(-1) >= 0.5).all()
    scores[:, 100] = 50
    chosen = top_tokens(scores, policy, **where)
    assert chosen.tolist() == [[*range(4), 100, *range(200, 280), *range(384, 400)]] * 2
