"""The tail of a batch: each request as `retrieval.estimate.Tail` estimates it."""

from itertools import cycle

import pytest
import torch

from engine.kernels import merge_parts as merging
from engine.kernels.attend_whole import attend_whole, attend_whole_torch, attend_whole_triton
from engine.kernels.tail import estimate_tail, estimate_tail_torch, estimate_tail_triton
from retrieval.estimate import Tail
from tests.engine.kernels.rows import DTYPES, HEADS, contexts, placed, queries, some_ids

LENGTHS = [0, 1, 127, 300]


def case(heads, dim, dtype, cluster, count=70, lengths=LENGTHS, pitch=0):
    """Everything `estimate_tail` takes, what does not exist not being a number, and the tails."""
    hq, hk = heads
    q, most = queries(len(lengths), hq, dim, dtype), max(lengths)
    k, v = contexts(len(lengths), hk, most, dim, dtype)
    width = 2 * dim + 1
    clusters = -(-most // cluster) + 3
    room = torch.full((len(lengths), hk, clusters, width + pitch), torch.nan)
    summaries, tails = room[..., :width], []
    for b, length in enumerate(lengths):
        tail = Tail(hk, dim, cluster_tokens=cluster)
        tail.append(k[b, :, :length], v[b, :, :length])
        rows = tail.summaries
        summaries[b, :, : rows.shape[1]] = rows
        tails.append(tail)
    ids = some_ids(lengths, hk, count, seed=count)
    hot, slots, layout = placed(k, v, ids)
    at = torch.tensor(lengths, dtype=torch.int32)
    given = (
        q,
        summaries,
        at,
        ids,
        hot,
        slots,
        layout,
        cluster,
        1 / dim**0.5,
    )  # widens some by more than 2
    return given, tails, k, v


def by_request(given, tails, k, v):
    q, _, _, ids, *_, scale = given
    made = []
    for b, tail in enumerate(tails):
        at = ids[b][:, ids[b, 0] >= 0].long()
        wide = at[..., None].expand(-1, -1, k.shape[-1])
        if tail.length:
            made.append(tail.estimate(q[b], at, k[b].gather(1, wide), v[b].gather(1, wide), scale))
        else:
            made.append((torch.zeros_like(q[b]), torch.full(q.shape[1:2], -torch.inf)))
    return [torch.stack(x) for x in zip(*made)]


def assert_alike(got, want, dtype):
    close = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert got.out.dtype == dtype
    torch.testing.assert_close(got.out, want[0], rtol=close, atol=close)
    torch.testing.assert_close(got.lse, want[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("cluster", [1, 16, 32])
@pytest.mark.parametrize("heads", HEADS)
def test_the_definition_is_the_per_request_estimate(heads, cluster, dtype):
    for count in (1, 70, 400):
        given, tails, k, v = case(heads, 64, dtype, cluster, count)
        assert_alike(estimate_tail(*given), by_request(given, tails, k, v), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernel_equals_its_definition(heads, dim, dtype):
    given, *_ = case(heads, dim, dtype, 32, pitch=3)
    assert_alike(estimate_tail_triton(*given), estimate_tail_torch(*given), dtype)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_scores_are_capped(softcap):
    given, tails, k, v = case((4, 2), 64, torch.float32, 16)
    for tail in tails:
        tail.softcap = softcap
    want = by_request(given, tails, k, v)
    assert_alike(estimate_tail_torch(*given, softcap), want, torch.float32)
    assert_alike(estimate_tail_triton(*given, softcap), want, torch.float32)


@pytest.mark.parametrize("cluster", [1, 5, 16])
@pytest.mark.parametrize("count", [1, 16, 17, 129, 150])
def test_the_kernel_takes_out_any_number_of_tokens(count, cluster):
    """None, some and all of a run's; with 150, everything is selected and nothing remains."""
    given, tails, k, v = case((2, 1), 64, torch.float32, cluster, count, [150, 80])
    got = estimate_tail_triton(*given)
    assert_alike(got, by_request(given, tails, k, v), torch.float32)
    if count == 150:
        assert (got.out == 0).all()
        assert got.lse.isneginf().all()


@pytest.mark.parametrize("programs", [1, 6, 12])
def test_the_number_of_parts_changes_nothing_that_matters(monkeypatch, programs):
    given, *_ = case((4, 2), 64, torch.float32, 4, 70, [0, 299, 300])
    want = estimate_tail_torch(*given)
    monkeypatch.setattr(merging, "PROGRAMS", programs)
    assert_alike(estimate_tail_triton(*given), want, torch.float32)


@pytest.mark.parametrize("estimate", [estimate_tail_torch, estimate_tail_triton])
def test_tokens_without_a_slot_are_not_selected(estimate):
    given, tails, k, v = case((2, 1), 64, torch.float32, 16, 40, [300, 200])
    kept = torch.arange(40) % 3 != 1
    slots = given[5].masked_fill(~kept, -1)
    got = estimate(*given[:5], slots, *given[6:])
    fewer = (*given[:3], given[3][..., kept], *given[4:])
    assert_alike(got, by_request(fewer, tails, k, v), torch.float32)


@pytest.mark.parametrize("estimate", [estimate_tail_torch, estimate_tail_triton])
def test_slots_behind_the_last_id_mean_nothing(estimate):
    given, tails, k, v = case((2, 1), 64, torch.float32, 16, 40, [300, 20])
    slots = given[5].clone()
    slots[given[3] < 0] = 3
    got = estimate(*given[:5], slots, *given[6:])
    assert_alike(got, by_request(given, tails, k, v), torch.float32)


@pytest.mark.parametrize("attend", [attend_whole_torch, attend_whole_triton])
@pytest.mark.parametrize("programs", [1, 40])
def test_what_is_selected_and_the_tail_are_all_there_is(attend, programs, monkeypatch):
    """Clusters of one token estimate nothing: it is dense attention, whatever is selected."""
    monkeypatch.setattr(merging, "PROGRAMS", programs)
    given, _, k, v = case((4, 2), 64, torch.float32, 1, 70)
    q, scale = given[0], given[-1]
    got = attend(*given)
    assert got.out[0].eq(0).all()
    assert got.lse[0].isneginf().all()
    for b, length in enumerate(LENGTHS[1:], 1):
        scores = q[b].unflatten(0, (2, 2)) @ k[b, :, :length].mT * scale
        want = (scores.softmax(-1) @ v[b, :, :length]).flatten(0, 1)
        torch.testing.assert_close(got.out[b], want, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got.lse[b], scores.logsumexp(-1).flatten(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_kernels_merge_all_parts_at_once(softcap):
    given, *_ = case((4, 2), 80, torch.float16, 32, pitch=3)
    want = attend_whole_torch(*given, softcap)
    assert_alike(attend_whole_triton(*given, softcap), want, torch.float16)
    assert_alike(attend_whole(*given, softcap), want, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cluster", [1, 32])
def test_on_a_gpu_it_equals_its_definition(dtype, cluster):
    for heads, dim in zip([*HEADS, (8, 8), (32, 8)], cycle((64, 80, 128))):
        given, *_ = case(heads, dim, dtype, cluster, 500, [0, 1, 4000, 900], pitch=15)
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given]
        for ours, theirs in (
            (estimate_tail, estimate_tail_torch),
            (attend_whole, attend_whole_torch),
        ):
            got = ours(*moved)
            assert_alike(type(got)(*(x.cpu() for x in got)), theirs(*given), dtype)
