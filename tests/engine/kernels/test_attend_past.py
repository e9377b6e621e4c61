"""The compiled attention of tokens over their own past, against its definition."""

import pytest
import torch

from engine.attention import attend_chunk
from engine.blend.runs import Runs
from engine.kernels import attend_past
from engine.kernels.attend_past import attend_past_native, can_attend, serves
from engine.model.pieces import AttentionSpec

HEADS = [(1, 1), (4, 2), (6, 2), (7, 1), (16, 16)]
KINDS = [(None, None), (1, None), (70, None), (1000, None), (None, 2.0), (50, 30.0)]


@pytest.fixture(autouse=True)
def pair_products(compiled):
    """Skips where the processor has no products of pairs in bf16."""
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    if not can_attend(x, x, x):
        pytest.skip("needs a CPU with AVX512_BF16")


def tensors(hq, hk, n, s, dim, seed=0):
    """q, k and v as a loop has them: a part of the queries of more tokens, a cache with room."""
    generator = torch.Generator().manual_seed(seed + s * dim + hq)
    q = 2 * torch.randn(hq, n + 5, dim, generator=generator)[:, 3 : n + 3]
    k, v = (torch.randn(hk, s + 9, dim, generator=generator)[:, :s] for _ in range(2))
    return tuple(x.bfloat16() for x in (q, k, v))


def scattered(n, s, seed=0):
    chosen = torch.randperm(s, generator=torch.Generator().manual_seed(seed))[:n]
    return chosen.sort().values


def exact(q, k, v, positions, spec):
    """Written out, in float64."""
    i, j = positions[:, None], torch.arange(k.shape[1])
    hidden = (j > i) | (j <= i - (spec.window or k.shape[1]))
    k, v = (x.double().repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q.double() @ k.mT * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(("hq", "hk"), HEADS)
@pytest.mark.parametrize(("n", "s"), [(1, 1), (1, 200), (6, 6), (45, 127), (64, 64), (130, 300)])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_it_errs_at_most_as_much_as_rounding_twice(hq, hk, n, s, dim):
    q, k, v = tensors(hq, hk, n, s, dim)
    for positions in (torch.arange(s - n, s), scattered(n, s)):
        spec = AttentionSpec(scale=dim**-0.5)
        want = exact(q, k, v, positions, spec)
        got = attend_past_native(q, k, v, positions, spec)
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 2 * (want.bfloat16().double() - want).norm()


@pytest.mark.parametrize(("window", "softcap"), KINDS)
@pytest.mark.parametrize("dim", [64, 80])
def test_windows_and_softcaps_are_those_of_the_definition(window, softcap, dim):
    spec = AttentionSpec(scale=dim**-0.5, window=window, softcap=softcap)
    q, k, v = tensors(8, 2, 100, 400, dim)
    for positions in (torch.arange(300, 400), scattered(100, 400)):
        want = exact(q, k, v, positions, spec)
        got = attend_past_native(q, k, v, positions, spec).double()
        assert (got - want).norm() <= 2 * (want.bfloat16().double() - want).norm()


@pytest.mark.parametrize("window", [None, 100])
def test_a_token_gets_the_same_bits_whichever_others_come_with_it(window):
    spec = AttentionSpec(scale=0.125, window=window)
    q, k, v = tensors(6, 2, 500, 500, 64)
    whole = attend_past_native(q, k, v, torch.arange(500), spec)
    for start, stop in [(0, 1), (0, 64), (63, 66), (170, 423), (499, 500)]:
        own = slice(start, stop)
        at = torch.arange(start, stop)
        part = attend_past_native(q[:, own], k[:, :stop], v[:, :stop], at, spec)
        assert torch.equal(part, whole[:, own])
    some = scattered(77, 500)
    assert torch.equal(attend_past_native(q[:, some], k, v, some, spec), whole[:, some])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_bits(threads):
    spec, before = AttentionSpec(scale=0.1), torch.get_num_threads()
    q, k, v = tensors(4, 2, 700, 900, 64)
    want = attend_past_native(q, k, v, torch.arange(200, 900), spec)
    torch.set_num_threads(threads)
    try:
        got = attend_past_native(q, k, v, torch.arange(200, 900), spec)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, want)


def test_what_lies_behind_the_last_position_is_not_read():
    spec = AttentionSpec(scale=0.1)
    q, k, v = tensors(4, 2, 10, 150, 64)
    want = attend_past_native(q, k[:, :101], v[:, :101], torch.arange(91, 101), spec)
    k[:, 101:], v[:, 101:] = torch.nan, torch.inf
    got = attend_past_native(q, k, v, torch.arange(91, 101), spec)
    assert torch.equal(got, want)


def test_scores_of_any_size_and_what_is_not_a_number():
    q, k, v = tensors(2, 1, 5, 200, 64)
    at, spec = torch.arange(195, 200), AttentionSpec(scale=1.0)
    for factor in (0.0, 1e3, 1e8):  # everything alike; one key takes all
        asked = (q * factor).bfloat16()
        want = exact(asked, k, v, at, spec)
        got = attend_past_native(asked, k, v, at, spec)
        torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-3)
    v[0, 70, 3] = torch.nan
    got = attend_past_native(q, k, v, at, spec)
    assert got[:, :, 3].isnan().all()
    assert got[:, :, 4:].isfinite().all()
    k[0, 70, 3] = torch.nan
    assert attend_past_native(q, k, v, at, spec).isnan().all()


def test_chunks_and_scattered_tokens_go_through_it_where_it_gains(monkeypatch):
    asked, spec = [], AttentionSpec(scale=0.1)

    def noted(q, k, v, positions, spec):
        asked.append(positions.tolist())
        return attend_past_native(q, k, v, positions, spec)

    monkeypatch.setattr(attend_past, "attend_past_native", noted)
    q, k, v = tensors(4, 2, 3, 30, 64)
    for gains in (1, 0, 2):  # 2: a processor with matrix instructions, which torch uses
        monkeypatch.setattr(attend_past, "value", lambda *_, gains=gains: gains)
        attend_chunk(q, k, v, spec)
        Runs(torch.tensor([4, 8, 20]), torch.bfloat16).attend(q, k, v, spec)
    assert asked == [[27, 28, 29], [4, 8, 20]]


def test_it_leaves_to_torch_what_it_cannot_take():
    q, k, v = tensors(4, 2, 3, 30, 64)
    assert can_attend(q, k, v)
    assert not serves(q.float(), k.float(), v.float())
    assert not serves(q, k.half(), v)
    assert not serves(*tensors(4, 2, 3, 30, 72))
    assert not serves(q, k.mT.contiguous().mT, v)
