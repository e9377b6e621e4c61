"""Scores of rows against the same sums in double precision."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.kernels.score_rows import (
    part_units,
    score_rows,
    score_rows_torch,
    score_rows_triton,
)
from retrieval.kernels.scores import lse

SCALE = 0.125
WAYS = pytest.mark.parametrize(
    "way", [score_rows_torch, score_rows_triton], ids=["torch", "triton"]
)
LAYOUTS = [  # KV heads, G, row width, dtype, capacity in units
    (2, 1, 64, torch.float16, 300),
    (1, 3, 80, torch.bfloat16, 150),
    (2, 3, 160, torch.float32, 37),
    (2, 4, 128, torch.bfloat16, 127),
    (1, 8, 256, torch.float16, 65),
    (1, 5, 512, torch.float32, 33),
    (1, 4, 6, torch.float32, 1),
]

interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")


def make(heads, group, width, dtype, capacity, seed=0):
    """Rows that are NaN where no unit is, queries, and the units of four slots."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, heads, capacity, width, generator=generator).to(dtype)
    query = torch.randn(4, heads * group, width, generator=generator)
    units = torch.tensor([capacity, 0, 1, capacity * 2 // 3], dtype=torch.int32)
    for own, count in zip(rows, units.tolist()):
        own[:, count:] = torch.nan
    return rows, query, units


def plain(rows, query, units, skipped=None):
    """[B, Hq, U] in double precision, slot by slot."""
    group, raw = query.shape[1] // rows.shape[1], []
    for slot, count in enumerate(units.tolist()):
        keys = rows[slot].double().repeat_interleave(group, 0)
        own = torch.einsum("he,hue->hu", query[slot].double(), keys)
        own[:, count:] = -torch.inf
        if skipped is not None:
            own[skipped[slot].repeat_interleave(group, 0)] = -torch.inf
        raw.append(own)
    return torch.stack(raw)


def check(found, want, part):
    """Scores, the statistics of every part by definition, and what the softmax divides by."""
    close = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(found.raw, want, **close)
    logs = torch.split(want * SCALE, part, -1)
    assert found.top.shape == (*want.shape[:2], len(logs))
    torch.testing.assert_close(found.top, torch.stack([x.amax(-1) for x in logs], -1), **close)
    total = [x.logsumexp(-1) - x.amax(-1).nan_to_num(neginf=0.0) for x in logs]
    torch.testing.assert_close(found.total, torch.stack(total, -1).exp(), **close)
    torch.testing.assert_close(lse(found), (want * SCALE).logsumexp(-1), **close)


@interpreter
@WAYS
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_the_products_and_what_is_behind_the_units_does_not_matter(way, layout):
    rows, query, units = make(*layout)
    check(way(rows, query, units, SCALE), plain(rows, query, units), part_units(*layout[2:4]))


@interpreter
@WAYS
def test_a_skipped_unit_has_no_share_in_the_softmax(way):
    rows, query, units = make(2, 3, 64, torch.float16, 300)
    skipped = torch.rand(4, 2, 300, generator=torch.Generator().manual_seed(3)) < 0.3
    skipped[0, 1, :] = True  # all there are
    skipped[3, 0, :128] = True  # a whole part
    rows[skipped] = 60_000.0
    found = way(rows, query, units, SCALE, skipped=skipped)
    check(found, plain(rows, query, units, skipped), part_units(64, torch.float16))


@interpreter
@WAYS
def test_more_units_than_there_is_room_for_are_all_there_are(way):
    rows, query, units = make(1, 2, 16, torch.float32, 50)
    full, over = torch.full_like(units, 50), torch.full_like(units, 51)
    rows.nan_to_num_(0.0)
    for want, got in zip(way(rows, query, full, SCALE), way(rows, query, over, SCALE)):
        assert torch.equal(want, got)


@interpreter
@WAYS
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")  # of the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_no_number_shows_in_its_own_head_only(way, bad):
    rows, query, units = make(2, 4, 64, torch.float32, 100)
    query[0, 5], rows[0, 1, 70] = query[0, 5].abs(), rows[0, 1, 70].abs()
    query[0, 5, 0] = bad
    found = way(rows, query, units, SCALE)
    assert lse(found)[0, 5].isnan()
    assert not lse(found).isnan()[0, [0, 1, 2, 3, 4, 6, 7]].any()


@interpreter
@WAYS
def test_large_scores_do_not_overflow_the_statistics(way):
    rows, query, units = make(1, 4, 64, torch.float32, 100)
    found = way(rows * 1e4, query, units, SCALE)
    assert lse(found)[0].isfinite().all()


def test_rows_that_are_not_contiguous_are_refused():
    rows, query, units = make(1, 1, 8, torch.float32, 6)
    with pytest.raises(ValueError, match="contiguous"):
        score_rows_triton(rows.mT.contiguous().mT, query, units, SCALE)


def test_tensors_of_a_cpu_go_to_the_definition():
    given = make(1, 2, 16, torch.bfloat16, 20)
    for want, got in zip(score_rows_torch(*given, SCALE), score_rows(*given, SCALE)):
        assert torch.equal(want, got)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*LAYOUTS, (8, 4, 128, torch.bfloat16, 16384)], ids=str)
def test_a_device_scores_as_double_precision_does(layout):
    rows, query, units = make(*layout)
    skipped = torch.rand(rows.shape[:3], generator=torch.Generator().manual_seed(3)) < 0.1
    found = score_rows(rows.cuda(), query.cuda(), units.cuda(), SCALE, skipped=skipped.cuda())
    want = plain(rows, query, units, skipped)
    check(type(found)(*(x.cpu() for x in found)), want, part_units(*layout[2:4]))
