"""Keys of tokens, of the kernel and its definition, against the scores of `retrieval.select`."""

import pytest
import torch

from retrieval.kernels.group import keys_torch, keys_triton
from retrieval.kernels.scores import Scores, scored
from retrieval.select import group_scores

LOWEST, HIGHEST = -(2**31), 2**31 - 1
BOTH = pytest.mark.parametrize("keys", [keys_torch, keys_triton], ids=["torch", "triton"])


def some_scores(lengths, *, heads, group=2, unit=1, units=None, part=4, scale=1.0, seed=0):
    """Random scores of a batch, -inf behind its lengths."""
    units = units or -(-max(-(-max(lengths) // unit), 1) // part) * part
    generator = torch.Generator().manual_seed(seed)
    raw = 4 * torch.randn(len(lengths), heads * group, units, generator=generator)
    for slot, length in enumerate(lengths):
        raw[slot, :, -(-length // unit) :] = -torch.inf
    return scored(raw, scale, part)


def settled(keys, scores, lengths, **changed):
    """Keys under plain settings, but for those that are changed."""
    plain = dict(num_kv_heads=1, scale=1.0, sinks=0, window=0, reduce="max", unit=1)
    return keys(scores, torch.tensor(lengths, dtype=torch.int32), **plain | changed)


def floats(keys):
    """The numbers whose keys these are."""
    return torch.where(keys < 0, keys ^ HIGHEST, keys).view(torch.float32)


@BOTH
@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize(("group", "unit"), [(1, 16), (3, 1), (4, 8), (8, 7)])
def test_keys_are_the_log_probabilities_of_the_group(keys, reduce, group, unit):
    lengths = [0, 1, 127, 300]
    scores = some_scores(lengths, heads=2, group=group, unit=unit, scale=0.3)
    found = settled(
        keys,
        scores,
        lengths,
        num_kv_heads=2,
        scale=0.3,
        sinks=3,
        window=5,
        unit=unit,
        reduce=reduce,
    )
    assert found.shape == (4, 2, scores.raw.shape[2] * unit)
    for slot, length in enumerate(lengths):
        assert (found[slot, :, length:] == LOWEST).all()
        assert (found[slot, :, : min(3, length)] == HIGHEST).all()
        assert (found[slot, :, max(0, length - 5) : length] == HIGHEST).all()
        if length:
            raw = scores.raw[slot, :, : -(-length // unit)]
            want = group_scores(raw, 2, 0.3, reduce).repeat_interleave(unit, 1)
            free = slice(3, max(3, length - 5))
            got = floats(found[slot, :, free])
            torch.testing.assert_close(got, want[:, free], rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("units", [1, 1024, 1025])
def test_units_are_shared_out_between_programs_whatever_their_number(keys, units):
    lengths = [units, max(1, units - 3), 0, units // 2]
    scores = some_scores(lengths, heads=1, group=2, units=units, part=1)
    found = settled(keys, scores, lengths)
    for slot, length in enumerate(lengths):
        want = group_scores(scores.raw[slot, :, :length], 1, 1.0)
        torch.testing.assert_close(floats(found[slot, :, :length]), want, rtol=1e-5, atol=1e-5)
        assert (found[slot, :, length:] == LOWEST).all()


@BOTH
def test_equal_scores_have_equal_keys_and_larger_scores_larger_keys(keys):
    raw = torch.randint(-40, 40, (2, 6, 400), generator=torch.Generator().manual_seed(1)) / 8.0
    found = settled(keys, scored(raw, 0.7, 8), [400, 400], num_kv_heads=6, scale=0.7)
    for key, score in zip(found.flatten(0, 1), raw.flatten(0, 1)):
        order = score.argsort(stable=True)
        steps = key[order].long().diff().sign()
        assert steps.tolist() == score[order].diff().sign().tolist()


@BOTH
def test_what_lies_behind_a_length_is_not_looked_at(keys):
    lengths, unit = [0, 1, 130, 202], 8
    scores = some_scores(lengths, heads=2, group=3, unit=unit)
    settings = dict(num_kv_heads=2, sinks=2, window=3, unit=unit, reduce="sum")
    outliers = torch.tensor([[5, -1], [-1, 100]], dtype=torch.int32).repeat(4, 1, 1)
    want = settled(keys, scores, lengths, outliers=outliers, **settings)
    poisoned = scores.raw.clone()
    for slot, length in enumerate(lengths):
        poisoned[slot, :, -(-length // unit) :] = torch.nan
    scores.top[0], scores.total[0] = torch.nan, torch.nan
    found = settled(keys, scores._replace(raw=poisoned), lengths, outliers=outliers, **settings)
    assert torch.equal(found, want)


@BOTH
def test_outliers_must_be_taken_where_they_exist(keys):
    lengths = [50, 20, 0]
    scores = some_scores(lengths, heads=2)
    outliers = torch.tensor([[[7, 31, -1], [0, 7, 49]]] * 3, dtype=torch.int32)
    found = settled(keys, scores, lengths, num_kv_heads=2, outliers=outliers)
    forced = [[(row == HIGHEST).nonzero().flatten().tolist() for row in slot] for slot in found]
    assert forced == [[[7, 31], [0, 7, 49]], [[7], [0, 7]], [[], []]]
    none = outliers[..., :0]
    plain = settled(keys, scores, lengths, num_kv_heads=2)
    assert torch.equal(settled(keys, scores, lengths, num_kv_heads=2, outliers=none), plain)


@BOTH
def test_a_view_of_scores_whose_heads_lie_apart_is_taken_too(keys):
    lengths = [40, 29]
    scores = some_scores(lengths, heads=2)
    room = torch.full((3, 5, 48), torch.nan)
    room[:2, :4, :40] = scores.raw
    found = settled(keys, scores._replace(raw=room[:2, :4, :40]), lengths, num_kv_heads=2)
    assert torch.equal(found, settled(keys, scores, lengths, num_kv_heads=2))


def improbable_scores():
    """Of six slots, with what is infinite or not a number."""
    raw = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(2))
    raw[0, :, 5:9] = -torch.inf  # improbable in every query head
    raw[1, 1, 3:7] = -torch.inf  # in one of two
    raw[2] = -torch.inf  # nothing to choose by
    raw[3, 0] = -torch.inf  # a whole query head
    raw[4, 2, 9], raw[4, 1, 4] = torch.nan, torch.inf
    raw[5] = torch.nan
    return raw


@BOTH
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter uses
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_infinities_and_what_is_not_a_number_come_where_select_has_them(keys, reduce):
    raw = improbable_scores()
    found = settled(keys, scored(raw, 1.0, 4), [16] * 6, num_kv_heads=2, reduce=reduce)
    grouped = torch.stack([group_scores(row, 2, 1.0, reduce) for row in raw])
    want = grouped.nan_to_num(nan=-torch.inf, neginf=torch.finfo(torch.float32).min)
    torch.testing.assert_close(floats(found), want, rtol=1e-5, atol=1e-5)
    assert (found > LOWEST).all()


@BOTH
def test_a_probability_of_one_has_one_key_whatever_the_sign_of_its_logarithm(keys):
    raw = torch.full((1, 2, 8), -1e30)
    raw[0, 0, 2] = raw[0, 1, 5] = 0.0
    scores = scored(raw, 1.0, 8)
    for zero in (0.0, -0.0):
        heads = torch.full_like(scores.top, zero)
        signed = Scores(raw.where(raw < 0, zero), heads, scores.total)
        assert settled(keys, signed, [8])[0, 0, [2, 5]].tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize(("group", "unit"), [(1, 16), (3, 1), (4, 8), (8, 7), (4, 1)])
def test_a_device_has_the_keys_of_the_definition(reduce, group, unit):
    lengths = [0, 1, 1027, 30000]
    random = some_scores(lengths, heads=2, group=group, unit=unit)
    improbable = scored(improbable_scores(), 1.0, 4)
    for scores, ends in ((random, lengths), (improbable, [16] * 6)):
        device = Scores(*(x.cuda() for x in scores))
        given = dict(num_kv_heads=2, sinks=3, window=5, reduce=reduce, unit=unit)
        length = torch.tensor(ends, dtype=torch.int32).cuda()
        outliers = torch.tensor([[[4, -1], [9, 7]]] * len(ends), dtype=torch.int32).cuda()
        want = keys_torch(device, length, scale=1.0, outliers=outliers, **given)
        found = keys_triton(device, length, scale=1.0, outliers=outliers, **given)
        assert torch.equal(found == HIGHEST, want == HIGHEST)
        assert torch.equal(found == LOWEST, want == LOWEST)
        free = (want != HIGHEST) & (want != LOWEST)
        torch.testing.assert_close(floats(found[free]), floats(want[free]), rtol=1e-5, atol=1e-5)
