"""Rows that grow, and exact products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval import pending
from retrieval.pending import Rows, products, unit_max
from tests.retrieval.keys import DTYPES, LENGTHS, SHAPES, make_keys, make_query, plain_scores


@given(
    steps=st.lists(st.tuples(st.sampled_from(["append", "rewind", "share"]), st.integers(0, 9))),
    shape=st.sampled_from([(), (3,), (2, 4)]),
)
def test_rows_are_a_list_and_never_write_what_they_share(steps, shape):
    rows, lent = Rows(2, shape, torch.int64), []
    want = torch.empty(2, 0, *shape, dtype=torch.int64)
    for at, (step, n) in enumerate(steps):
        if step == "append":
            new = torch.randint(0, 1000, (2, n, *shape), generator=torch.manual_seed(at))
            rows.append(new)
            want = torch.cat([want, new], 1)
        elif step == "rewind":
            rows.rewind(n)
            want = want[:, :n]
        else:
            lent.append((rows.view, rows.view.clone()))
            rows = Rows.of(rows.view)
        assert rows.length == want.shape[1]
        assert torch.equal(rows.view, want)
        assert all(torch.equal(view, before) for view, before in lent)


def test_a_token_at_a_time_moves_rows_a_few_times_only():
    rows, places = Rows(2, (4,), torch.float32), set()
    for i in range(1000):
        rows.append(torch.full((2, 1, 4), float(i)))
        places.add(rows.view.data_ptr())
    assert len(places) <= 55  # moves; memory that was freed may be used again
    assert rows.view[1, :, 3].tolist() == list(range(1000))
    assert rows.nbytes == rows.view.nbytes / 1000 * rows._buffer.shape[1] < 1.2 * 1000 * 2 * 16


def test_rows_of_another_kind_are_refused():
    rows = Rows(2, (4,), torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes \[2, N, 4\] in torch.bfloat16.*torch.float32"):
        rows.append(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"got \[1, 3, 4\]"):
        rows.append(torch.zeros(1, 3, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"got \[2, 3, 5\]"):
        rows.append(torch.zeros(2, 3, 5, dtype=torch.bfloat16))
    assert rows.length == 0


@pytest.mark.parametrize(("hk", "group", "dim"), SHAPES)
@pytest.mark.parametrize("length", [0, *LENGTHS, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_products_are_exact_in_fp32(hk, group, dim, length, dtype):
    keys, query = make_keys(hk, length, dim, dtype), make_query(hk * group, dim, dtype)
    got = products(query, keys)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), plain_scores(query, keys), rtol=1e-5, atol=1e-4)


def test_products_do_not_depend_on_how_many_keys_are_widened_at_once(monkeypatch):
    keys, query = make_keys(2, 100, 64, torch.bfloat16), make_query(4, 64)
    want = products(query, keys)
    monkeypatch.setattr(pending, "CAST_ELEMENTS", 1000)
    torch.testing.assert_close(products(query, keys), want)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 12])
def test_the_largest_of_every_unit_counts_a_partial_last_one(length):
    scores = -torch.rand(3, length) - 1  # a unit filled up with zeros would score 0
    want = [[max(row[i : i + 6]) for i in range(0, length, 6)] for row in scores.tolist()]
    assert unit_max(scores, 6).tolist() == want
