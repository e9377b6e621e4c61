"""The compiled attention with an estimate of what is not selected against its definition."""

import threading

import pytest
import torch

from engine.attention import attend_part, merge
from engine.kernels.attend_tail import attend_tail_native, can_estimate
from engine.kernels.attend_token import Partial, attend_rows_native, row_place
from engine.model.pieces import AttentionSpec
from kvstore.rows import Raw, RowLayout
from retrieval.estimate import Tail

HEADS = [(1, 1), (4, 2), (8, 2), (6, 2), (10, 2), (7, 1), (4, 4)]  # groups of 1 to 7
LENGTHS = [1, 2, 31, 32, 33, 5000]
CASES = [(heads, 300) for heads in HEADS] + [(h, n) for n in LENGTHS for h in HEADS[1::2]]
DTYPES = [torch.float32, torch.bfloat16]


class Case:
    """A context with a tail, its rows in any order in a pool, and some that are selected."""

    def __init__(self, heads, length, dim, dtype, count, cluster=32):
        (hq, self.hk), generator = heads, torch.Generator().manual_seed(length + dim)
        self.q = (2 * torch.randn(hq, dim, generator=generator)).to(dtype)
        self.k, self.v = (
            torch.randn(self.hk, length, dim, generator=generator).to(dtype) for _ in range(2)
        )
        self.tail = Tail(self.hk, dim, cluster_tokens=cluster)
        self.tail.append(self.k, self.v)
        self.layout, self.scale = RowLayout(Raw(dtype), Raw(dtype), dim, dtype), dim**-0.5
        picked = [torch.randperm(length, generator=generator)[:count] for _ in range(self.hk)]
        self.ids = torch.stack(picked).sort(-1).values
        order = torch.randperm(self.hk * length, generator=generator)
        encoded = self.layout.encode(self.k, self.v).flatten(0, 1)
        self.rows = torch.empty_like(encoded)
        self.rows[order] = encoded
        heads_at = torch.arange(self.hk)[:, None] * length
        self.chosen = order[heads_at + self.ids]

    def native(self):
        place = row_place(self.layout)
        assert place is not None
        assert can_estimate(self.tail, place.dtype, self.layout.head_dim)
        held = self.rows, self.chosen, place
        return attend_tail_native(self.q, self.tail, self.ids, *held, self.scale)

    def defined(self):
        at = torch.arange(self.hk)[:, None], self.ids
        k, v, q = self.k[at].float(), self.v[at].float(), self.q.float()
        rest = Partial(*self.tail.estimate(q, self.ids, k, v, self.scale))
        return merge([attend_part(q, k, v, AttentionSpec(scale=self.scale)), rest])


def assert_alike(got, want, dtype):
    close = 2e-5 if dtype == torch.float32 else 2e-2
    assert got.out.dtype == dtype
    torch.testing.assert_close(got.out.float(), want.out, rtol=close, atol=close)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("heads", "length"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_it_equals_its_definition(compiled, heads, length, dtype):
    for dim in (16, 64, 80, 128, 256):
        for count in {0, 1, length // 7, length - 1}:
            case = Case(heads, length, dim, dtype, count)
            assert_alike(case.native(), case.defined(), dtype)


@pytest.mark.parametrize("cluster", [1, 5, 128])
def test_clusters_may_have_any_size(compiled, cluster):
    case = Case((4, 2), 700, 64, torch.float32, 60, cluster)
    assert_alike(case.native(), case.defined(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_if_everything_is_selected_nothing_is_added(compiled, dtype):
    case = Case((6, 2), 300, 64, dtype, 300)
    got, place = case.native(), row_place(case.layout)
    want = attend_rows_native(case.q, case.rows, case.chosen, place, case.scale)
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_one_cluster_may_be_selected_whole_beside_others(compiled):
    case = Case((4, 2), 300, 64, torch.float32, 32)
    case.ids = torch.arange(64, 96).expand(2, -1).contiguous()
    flat = case.layout.encode(case.k, case.v).flatten(0, 1)
    case.rows, case.chosen = flat, case.ids + torch.tensor([[0], [300]])
    assert_alike(case.native(), case.defined(), torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing_that_matters(compiled, threads):
    case, before = Case((4, 2), 9000, 64, torch.float32, 500), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = case.native()
    finally:
        torch.set_num_threads(before)
    assert_alike(got, case.defined(), torch.float32)


def test_logits_of_any_size(compiled):
    case = Case((4, 2), 2000, 64, torch.float32, 100)
    for factor in (1e-6, 40.0, 1000.0):
        case.q = case.q * factor
        got, want = case.native(), case.defined()
        assert got.out.isfinite().all()
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.out, want.out, rtol=1e-2, atol=1e-2)
        case.q = case.q / factor


def test_two_callers_at_once_do_not_disturb_each_other(compiled):
    cases = [Case((8, 2), 3000 + i, 128, torch.bfloat16, 200) for i in range(2)]
    want = [case.native().out for case in cases]
    wrong = []

    def call(i):
        wrong.extend(i for _ in range(50) if not torch.equal(cases[i].native().out, want[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 64), (torch.float32, 72)])
def test_what_it_cannot_take_it_does_not(dtype, dim):
    assert not can_estimate(Tail(2, dim), dtype, dim)
    assert not can_estimate(Tail(2, 64, softcap=50.0), torch.float32, 64)
