"""Ids of the largest keys, against `sorted` and against the selection of one request."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.kernels.choose import (
    best_tokens,
    choose,
    choose_torch,
    choose_triton,
    choose_whole,
)
from retrieval.kernels.cut import RUN, SETS, choose_cut
from retrieval.kernels.group import keys_triton
from retrieval.kernels.scores import scored
from retrieval.select import Policy, top_tokens

LOWEST, HIGHEST = -(2**31), 2**31 - 1
WAYS = {"torch": choose_torch, "whole": choose_whole, "cut": choose_cut}
EVERY = pytest.mark.parametrize("choose", WAYS.values(), ids=WAYS)


def plain(keys, length, budget):
    """Ids of one row: the largest, of equal ones the later, then -1."""
    order = sorted(range(length), key=lambda t: (keys[t], t), reverse=True)
    ids = sorted(order[:budget])
    return ids + [-1] * (budget - len(ids))


def check(choose, keys, lengths, budget):
    """That every row has the ids it should, and what they are."""
    found = choose(keys, torch.tensor(lengths, dtype=torch.int32), budget)
    assert found.shape == (*keys.shape[:2], budget)
    for slot, length in enumerate(lengths):
        for row, got in zip(keys[slot].tolist(), found[slot].tolist()):
            assert got == plain(row, length, budget)
    return found


def random_keys(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LOWEST, HIGHEST, shape, generator=generator).int()


@st.composite
def cases(draw, most=45):
    """Few rows with many ties, at both ends of the integers too."""
    heads, capacity = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(0, capacity), min_size=1, max_size=2))
    some = st.one_of(
        st.integers(-2, 2),
        st.sampled_from([LOWEST, LOWEST + 1, HIGHEST - 1, HIGHEST]),
        st.integers(LOWEST, HIGHEST),
    )
    count = len(lengths) * heads * capacity
    flat = draw(st.lists(some, min_size=count, max_size=count))
    keys = torch.tensor(flat, dtype=torch.int32).reshape(len(lengths), heads, capacity)
    return keys, lengths, draw(st.integers(1, min(most, capacity + 5)))


@pytest.mark.parametrize("choose", [choose_torch, choose_whole], ids=["torch", "whole"])
@given(case=cases())
@settings(max_examples=30)
def test_it_takes_what_sorting_takes(choose, case):
    check(choose, *case)


@given(case=cases(most=12))
@settings(max_examples=30)
def test_it_takes_what_sorting_takes_where_rows_are_cut(case):
    with pytest.MonkeyPatch.context() as patch:
        small = dict(RUN=16, PART=16, SETS=16, ROOM=1, DEPTH=2, WIDTH=16)
        for name, value in small.items():
            patch.setattr(f"retrieval.kernels.cut.{name}", value)
        check(choose_cut, *case)


@EVERY
@pytest.mark.parametrize("budget", [1, 20, 1500])
def test_it_takes_what_sorting_takes_of_long_rows(choose, budget):
    capacity = 2 * RUN + 300  # three parts, five sets deep
    keys = random_keys(2, 1, capacity, seed=budget)
    keys[1] >>= 25  # 128 numbers
    check(choose, keys, [capacity, capacity - 77], budget)


@EVERY
@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, SETS - 1, SETS + 1, RUN])
def test_rows_shorter_than_the_budget_are_taken_whole(choose, length):
    check(choose, random_keys(1, 2, RUN + 9), [length], 10)


@EVERY
@pytest.mark.parametrize("key", [LOWEST, -1, 0, HIGHEST])
def test_of_equal_keys_the_last_are_taken(choose, key):
    capacity = 3 * RUN  # more equal keys than there is room for
    keys = torch.full((1, 1, capacity), key, dtype=torch.int32)
    found = check(choose, keys, [capacity - 5], 12)
    assert found.flatten().tolist() == list(range(capacity - 17, capacity - 5))


@EVERY
def test_more_keys_that_must_be_taken_than_the_budget_leave_the_last_of_them(choose):
    keys = random_keys(1, 1, RUN + 50)
    keys[..., 100:900:4] = HIGHEST
    found = check(choose, keys, [RUN + 50], 16)
    assert found.flatten().tolist() == list(range(836, 900, 4))


def test_rows_whose_largest_keys_share_few_sets_are_searched_whole():
    depth, columns = 9, 1000
    keys = random_keys(1, 1, depth * SETS) >> 2
    keys.view(depth, SETS)[:, :columns] += 2**30  # 9,000 of them in 1,000 sets: no room
    check(choose_cut, keys, [depth * SETS], columns + 5)


@EVERY
def test_what_lies_behind_a_length_is_not_looked_at(choose):
    lengths, capacity = [0, 3, RUN - 1, RUN + 2], RUN + 40
    keys = random_keys(4, 1, capacity)
    want = check(choose, keys, lengths, 30)
    for slot, length in enumerate(lengths):
        keys[slot, :, length:] = HIGHEST
    assert torch.equal(choose(keys, torch.tensor(lengths, dtype=torch.int32), 30), want)


def test_rows_are_cut_where_they_are_long_enough_for_their_budget(monkeypatch):
    taken = []
    for name in ("choose_whole", "choose_cut"):
        monkeypatch.setattr(
            f"retrieval.kernels.choose.{name}",
            lambda keys, lengths, budget, name=name: taken.append(name) or keys[..., :budget],
        )
    lengths = torch.tensor([1], dtype=torch.int32)
    for capacity, budget in ((16384, 64), (16385, 64), (32768, 8192), (32769, 8192)):
        choose_triton(torch.zeros(1, 1, capacity, dtype=torch.int32), lengths, budget)
    assert taken == ["choose_whole", "choose_cut"] * 2


def selected(scores, lengths, policy, outliers=None, *, triton=True, **where):
    """Ids by both kernels, or by the definitions."""
    if not triton:
        return best_tokens(scores, lengths, policy, outliers=outliers, **where)
    how = dict(sinks=policy.sinks, window=policy.window, reduce=policy.reduce)
    keys = keys_triton(scores, lengths, outliers=outliers, **how, **where)
    return choose_triton(keys, lengths, policy.budget)


def check_selection(raw, lengths, policy, *, heads, unit, scale, outliers=None):
    """That every slot has the ids of `top_tokens` of its own scores."""
    scores = scored(raw, scale, raw.shape[2])
    where = dict(num_kv_heads=heads, unit=unit, scale=scale)
    for triton in (False, True):
        device = torch.tensor(lengths, dtype=torch.int32)
        found = selected(scores, device, policy, outliers, triton=triton, **where)
        for slot, length in enumerate(lengths):
            count = min(policy.budget, length)
            assert (found[slot, :, count:] == -1).all()
            if length:
                own = None if outliers is None else outliers[slot].long()
                have = raw[slot, :, : -(-length // unit)]
                want = top_tokens(have, policy, length=length, outliers=own, **where)
                assert found[slot, :, :count].tolist() == want.tolist()


def some_raw(lengths, heads, group, unit, seed):
    """Scores whose order no rounding decides, -inf behind lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), heads * group, -(-max(lengths) // unit)
    raw = 4 * torch.randn(shape, generator=generator)
    for slot, length in enumerate(lengths):
        raw[slot, :, -(-length // unit) :] = -torch.inf
    return raw


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize(("group", "unit"), [(1, 1), (3, 8), (4, 16), (8, 1), (4, 5)])
def test_a_batch_takes_what_each_of_its_requests_takes(reduce, group, unit):
    lengths = [333, 0, 1, 130, 48]
    raw = some_raw(lengths, 2, group, unit, seed=group)
    policy = Policy(budget=48, sinks=3, window=6, reduce=reduce)
    check_selection(raw, lengths, policy, heads=2, unit=unit, scale=0.4)


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("unit", [1, 8])
def test_so_it_does_where_most_scores_are_equal(reduce, unit):
    lengths, generator = [400, 219, 0], torch.Generator().manual_seed(unit)
    table = torch.randn(3, 8, 6, generator=generator)  # six codes, as of a codebook
    codes = torch.randint(0, 6, (3, 2, -(-400 // unit)), generator=generator)
    raw = table.gather(2, codes.repeat_interleave(4, 1))
    for slot, length in enumerate(lengths):
        raw[slot, :, -(-length // unit) :] = -torch.inf
    policy = Policy(budget=75, sinks=4, window=16, reduce=reduce)
    check_selection(raw, lengths, policy, heads=2, unit=unit, scale=1.0)


def test_outliers_are_taken_besides_sinks_and_window():
    lengths = [120, 90]
    raw = some_raw(lengths, 2, 2, 1, seed=5)
    outliers = torch.stack([torch.randperm(90)[:7].sort().values for _ in range(4)])
    outliers = outliers.view(2, 2, 7).int()
    raw.scatter_(2, outliers.repeat_interleave(2, 1).long(), -torch.inf)
    policy = Policy(budget=30, sinks=2, window=5)
    check_selection(raw, lengths, policy, heads=2, unit=1, scale=1.0, outliers=outliers)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter uses
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_zeros_of_both_signs_infinities_and_what_is_not_a_number_are_as_one_request_has_them(
    reduce,
):
    raw = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(3))
    raw[0, :, 10:50] = -torch.inf
    raw[1] = raw[1].sign() * 0.0
    raw[2, 3, 7], raw[2, 0, 60] = torch.nan, torch.inf
    raw[3], raw[4] = torch.nan, -torch.inf
    policy = Policy(budget=20, sinks=1, window=3, reduce=reduce)
    check_selection(raw, [64] * 5, policy, heads=2, unit=1, scale=1.0)


def test_a_share_of_the_attention_is_refused():
    raw = torch.zeros(1, 2, 8)
    lengths = torch.tensor([8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"same number of tokens .*unset top_p \(0.9\)"):
        best_tokens(
            scored(raw, 1.0, 8), lengths, Policy(64, top_p=0.9), num_kv_heads=1, scale=1.0, unit=1
        )


def test_tensors_of_a_cpu_go_to_the_definition():
    keys, lengths = random_keys(1, 1, 30), torch.tensor([30], dtype=torch.int32)
    assert choose(keys, lengths, 4).tolist() == choose_torch(keys, lengths, 4).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [64, 2048, 8192])
@pytest.mark.parametrize("capacity", [1000, 16384, 131072, 1 << 20])
@pytest.mark.parametrize("shift", [0, 12, 24])
def test_a_device_takes_what_the_definition_takes(budget, capacity, shift):
    keys = random_keys(3, 2, capacity, seed=shift).cuda() >> shift
    lengths = torch.tensor([capacity, capacity // 3, 0], dtype=torch.int32).cuda()
    want = choose_torch(keys, lengths, budget)
    assert torch.equal(choose_whole(keys, lengths, budget), want)
    assert torch.equal(choose_cut(keys, lengths, budget), want)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [4096, 65536])
def test_a_captured_choice_follows_lengths_and_scores(capacity):
    policy = Policy(budget=512, sinks=4, window=16)
    where = dict(num_kv_heads=2, unit=1, scale=0.1)
    first, then = (some_raw([capacity, capacity // 2], 2, 4, 1, seed) for seed in (1, 2))
    scores = scored(first.cuda(), 0.1, 64)
    lengths = torch.tensor([capacity, capacity // 2], dtype=torch.int32).cuda()
    best_tokens(scores, lengths, policy, **where)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = best_tokens(scores, lengths, policy, **where)
    other = scored(then.flip(0).cuda(), 0.1, 64)
    for old, new in zip(scores, other):
        old.copy_(new)
    lengths.copy_(lengths.flip(0))
    graph.replay()
    assert torch.equal(found, best_tokens(scores, lengths, policy, **where))
    assert (found[1, :, -1] == capacity - 1).all()
