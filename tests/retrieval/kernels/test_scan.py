"""The compiled scan and search against their definitions, and without a compiler."""

import logging
import platform
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from native import library as native
from retrieval.codes import Codes
from retrieval.kernels.scan import (
    SOURCE,
    quantized,
    scan,
    scan_native,
    scan_torch,
    search,
    search_native,
    serves,
)
from retrieval.select import Policy, group_scores, top_tokens

PROCESSORS = ["native", "haswell", "x86-64"]  # the best here; AVX2; the portable path


def use(processor: str, patch: pytest.MonkeyPatch) -> None:
    if processor != "native":
        if platform.machine() != "x86_64":
            pytest.skip(f"this machine does not run code for {processor}")
        if processor == "haswell" and "AVX" not in torch.backends.cpu.get_cpu_capability():
            pytest.skip("this machine has no AVX2")
    flags = [flag for flag in native.FLAGS if not flag.startswith("-march=")]
    patch.setattr(native, "FLAGS", [*flags, f"-march={processor}"])
    native.library.cache_clear()
    if native.library(SOURCE) is None:
        pytest.skip("no C compiler on this machine")


@pytest.fixture(params=PROCESSORS, scope="module")
def compiled(request):
    with pytest.MonkeyPatch.context() as patch:
        use(request.param, patch)
        yield
    native.library.cache_clear()


def made(hk, g, m, t, scaled=True, seed=0):
    """Random codes and tables."""
    generator = torch.Generator().manual_seed(seed)
    codes = Codes(hk, m, scaled=scaled)
    codes.append(
        torch.randint(0, 16, (hk, t, m), dtype=torch.uint8, generator=generator),
        0.5 + torch.rand(hk, t, generator=generator) if scaled else None,
    )
    return codes, torch.randn(hk * g, m, 16, generator=generator)


def best(codes, table, policy, scale):
    """The definition of a search."""
    heads, scores = len(codes.packed), scan_torch(codes, table)
    return top_tokens(scores, policy, num_kv_heads=heads, length=codes.length, scale=scale)


def same_but_for_near_ties(codes, table, policy, scale):
    got, want = search_native(codes, table, policy, scale), best(codes, table, policy, scale)
    assert got.shape == want.shape
    assert got.dtype == torch.int64
    assert (got.diff(dim=1) > 0).all()
    values = group_scores(scan_torch(codes, table), len(got), scale, policy.reduce)
    for ours, theirs, value in zip(got, want, values):
        differ = sorted(set(ours.tolist()) ^ set(theirs.tolist()))
        if differ:
            near = value[differ]
            assert near.max() - near.min() <= 1e-5 * max(1, near.abs().max()), (differ, near)


@pytest.mark.parametrize("t", [1, 31, 32, 33, 127, 300, 5000])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 31, 64, 130])
def test_scores_equal_their_definition(compiled, m, t):
    for g in (1, 3, 4, 8, 9):
        codes, table = made(2, g, m, t, scaled=g != 3, seed=g)
        want = scan_torch(codes, table)
        got = scan_native(codes, table)
        torch.testing.assert_close(got, want, rtol=3e-7, atol=4e-7 * m)


def test_sums_are_the_same_integers(compiled):
    for m in (1, 2, 7, 64, 130, 257):
        codes, _ = made(2, 3, m, 200, scaled=False)
        table = torch.randint(0, 256, (6, m, 16)).float()
        table[:, :, :2] = torch.tensor([0.0, 255.0])  # a step of 1, and no bias
        exact = scan_torch(codes, table)
        assert torch.equal(exact, exact.round())
        assert torch.equal(scan_native(codes, table), exact)
        full = torch.full_like(table, 255.0)
        full[:, :, 0] = 0  # the largest sums there are
        assert torch.equal(scan_native(codes, full), scan_torch(codes, full))


def test_the_definition_is_the_sum_of_table_entries_up_to_their_rounding():
    codes, table = made(2, 2, 24, 100)
    unpacked = torch.stack([codes.packed & 15, codes.packed >> 4], 2).mT.flatten(1, 3)[:, :100]
    for q in range(4):
        picked = table[q][torch.arange(24), unpacked[q // 2].long()]  # [T, M]
        exact = picked.sum(-1) * codes.scales[q // 2].float()
        error = (scan_torch(codes, table)[q] - exact).abs()
        assert error.max() <= quantized(table).step[q] / 2 * 24 * 1.5
        assert error.mean() <= 3e-2


@settings(max_examples=80)
@given(
    *(st.integers(1, n) for n in (3, 9, 40, 3000)),
    st.integers(1, 600),
    st.tuples(st.integers(0, 6), st.integers(1, 40)),
    st.sampled_from([0.0, 0.01, 0.3, 3.0, 30.0]),
    st.sampled_from(["max", "sum"]),
    st.booleans(),
    st.integers(1, 4),
)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_search_finds_the_best_of_all_scores(
    processor, hk, g, m, t, budget, ends, scale, reduce, scaled, threads
):
    policy = Policy(max(budget, sum(ends)), *ends, reduce=reduce)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        use(processor, patch)
        torch.set_num_threads(threads)
        try:
            same_but_for_near_ties(*made(hk, g, m, t, scaled, seed=t), policy, scale)
        finally:
            torch.set_num_threads(before)
            native.library.cache_clear()


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("budget", [20, 333, 2048, 30000])
def test_a_search_of_many_tokens(compiled, budget, reduce):
    codes, table = made(2, 4, 16, 40000)
    for scale in (0.01, 0.3, 5.0):
        same_but_for_near_ties(codes, table, Policy(budget, reduce=reduce), scale)


def test_of_equal_tokens_the_later_is_taken(compiled):
    codes, table = made(2, 2, 8, 3000)
    policy = Policy(100, sinks=2, window=3)
    alike = Codes(2, 8, scaled=False)
    alike.append(torch.zeros(2, 3000, 8, dtype=torch.uint8))
    want = torch.cat([torch.arange(2), torch.arange(2902, 3000)])
    for case in ((alike, table), (codes, torch.zeros_like(table))):
        assert torch.equal(search_native(*case, policy, 1.0), want.expand(2, -1))
    again = Codes(2, 8, scaled=False)  # every code ten times, far apart
    again.append(torch.randint(0, 16, (2, 300, 8), dtype=torch.uint8).repeat(1, 10, 1))
    for reduce in ("max", "sum"):
        policy = Policy(105, sinks=0, window=1, reduce=reduce)
        same_but_for_near_ties(again, table, policy, 0.3)
        for ids in search_native(again, table, policy, 0.3).tolist():
            taken = set(ids)
            assert all(i + 300 in taken for i in ids if i + 300 < 3000)


def test_hot_tokens_in_one_place_are_all_found(compiled):
    codes = Codes(1, 4, scaled=False)
    digits = torch.randint(0, 8, (1, 9000, 4), dtype=torch.uint8)
    digits[:, 4000:5000] += 8
    codes.append(digits)
    table = torch.arange(16.0).expand(1, 4, 16)
    got = search_native(codes, table, Policy(1020), 1.0)
    assert set(range(4000, 5000)) <= set(got[0].tolist())
    same_but_for_near_ties(codes, table, Policy(1020), 1.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_a_query_that_is_not_finite_is_answered_like_the_definition(compiled, value, reduce):
    codes, table = made(2, 3, 8, 2000)
    table[1, 2, 3] = value
    table[1, 2, 4] = -value
    policy = Policy(50, reduce=reduce)
    got = search_native(codes, table, policy, 1.0)
    want = best(codes, table, policy, 1.0)
    assert torch.equal(got[1], want[1])
    assert (got.diff(dim=1) > 0).all()
    if value != 1e38:
        assert torch.equal(got[0], want[0])
        assert scan_native(codes, table)[1].isnan().all()
        assert scan_torch(codes, table)[1].isnan().all()


def test_a_budget_of_all_tokens_takes_all(compiled):
    codes, table = made(2, 2, 4, 45)
    for budget in (45, 46, 1000):
        got = search_native(codes, table, Policy(budget), 1.0)
        assert torch.equal(got, torch.arange(45).expand(2, -1))
    same_but_for_near_ties(codes, table, Policy(44), 1.0)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_no_id(compiled, threads):
    before = torch.get_num_threads()
    cases = [made(1, 8, 16, 20000), made(8, 2, 8, 9000), made(3, 1, 5, 4000)]
    torch.set_num_threads(1)
    want = [search_native(*case, Policy(256), 0.5) for case in cases]
    torch.set_num_threads(threads)
    try:
        for case, ids in zip(cases, want):
            got = search_native(*case, Policy(256), 0.5)
            assert torch.equal(got, ids)
            torch.testing.assert_close(scan_native(*case), scan_torch(*case))
    finally:
        torch.set_num_threads(before)


def test_two_callers_at_once_do_not_disturb_each_other(compiled):
    cases = [made(4, 4, 16, 3000 + 100 * i, seed=i) for i in range(2)]
    want = [search_native(*case, Policy(200), 0.5) for case in cases]
    scores = [scan_native(*case) for case in cases]
    wrong = []

    def call(i):
        for _ in range(50):
            if not torch.equal(search_native(*cases[i], Policy(200), 0.5), want[i]):
                wrong.append(i)
            if not torch.equal(scan_native(*cases[i]), scores[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_top_p_and_sums_of_more_than_16_bits_are_left_to_torch(compiled):
    codes, table = made(1, 2, 8, 900)
    policy = Policy(200, top_p=0.5, least=30)
    got = search(codes, table, policy, 0.5)
    assert got.shape[1] < 200
    assert torch.equal(got, best(codes, table, policy, 0.5))
    codes, table = made(1, 1, 258, 100)
    assert not serves(codes)
    assert torch.equal(scan(codes, table), scan_torch(codes, table))


def test_tables_of_one_value_are_no_division_by_zero(compiled):
    codes, table = made(2, 1, 4, 100)
    table[:] = torch.tensor([2.0, -3.0])[:, None, None]
    want = torch.tensor([[8.0], [-12.0]]) * codes.scales.float()
    torch.testing.assert_close(scan_native(codes, table), want)
    torch.testing.assert_close(scan_torch(codes, table), want)


def test_without_a_compiler_torch_answers_and_it_is_said_once(monkeypatch, tmp_path, caplog):
    codes, table = made(2, 4, 16, 1000)
    policy = Policy(100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                ids = search(codes, table, policy, 0.5)
            scores = scan(codes, table)
    finally:
        native.library.cache_clear()
    assert torch.equal(scores, scan_torch(codes, table))
    assert torch.equal(ids, best(codes, table, policy, 0.5))
    assert len(caplog.records) == 1
    assert "scan is not compiled" in caplog.text
    if native.library(SOURCE) is not None:
        assert torch.equal(ids, search_native(codes, table, policy, 0.5))
