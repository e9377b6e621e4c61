"""Attention over rows of hot buffers: each request by the per-request code, and by definition."""

from itertools import cycle

import pytest
import torch

from engine.attention import attend_part, merge
from engine.kernels import attend_slots as kernel
from engine.kernels import merge_parts as merging
from engine.kernels.attend_slots import attend_slots, attend_slots_torch, attend_slots_triton
from engine.kernels.attend_token import Partial
from engine.kernels.merge_parts import merge_parts_torch, merge_parts_triton
from engine.model.pieces import AttentionSpec
from kvstore.rows import Int8, Raw, RowLayout
from tests.engine.kernels.rows import DTYPES, HEADS, contexts, placed, queries, some_ids

LENGTHS = [0, 1, 100, 65]


def case(heads, dim, dtype, count=70, lengths=LENGTHS):
    hq, hk = heads
    q = queries(len(lengths), hq, dim, dtype)
    k, v = contexts(len(lengths), hk, max(lengths), dim, dtype)
    ids = some_ids(lengths, hk, count)
    return q, k, v, ids, *placed(k, v, ids)


def by_request(q, k, v, ids, spec):
    """The per-request path over gathered rows, in double precision where it can."""
    outs, lses = [], []
    for b in range(len(q)):
        there = ids[b, 0] >= 0
        at = ids[b][:, there].long()[..., None].expand(-1, -1, k.shape[-1])
        part = attend_part(q[b], k[b].gather(1, at), v[b].gather(1, at), spec)
        outs.append(part.out)
        lses.append(part.lse)
    return torch.stack(outs), torch.stack(lses)


def assert_as_good_as_torch(q, k, v, ids, hot, slots, layout, spec):
    """At most twice the error of SDPA in the same dtype (of the definition with a softcap)."""
    ours = attend_slots_triton(q, hot, slots, layout, spec.scale, spec.softcap)
    assert ours.out.dtype == q.dtype
    wide = [x.double() for x in (q, k, v)]
    for b in range(len(q)):
        for h in range(ids.shape[1]):
            at = ids[b, h][ids[b, h] >= 0].long()
            own = slice(h * (q.shape[1] // ids.shape[1]), (h + 1) * (q.shape[1] // ids.shape[1]))
            if not len(at):
                assert (ours.out[b, own] == 0).all()
                assert ours.lse[b, own].isneginf().all()
                continue
            scores = wide[0][b, own] @ wide[1][b, h, at].mT * spec.scale
            theirs = torch.nn.functional.scaled_dot_product_attention(
                q[b, own][None], k[b, h, at][None], v[b, h, at][None], scale=spec.scale
            )[0]
            if spec.softcap is not None:
                scores = spec.softcap * (scores / spec.softcap).tanh()
                theirs = attend_slots_torch(q, hot, slots, layout, spec.scale, spec.softcap)
                theirs = theirs.out[b, own]
            want = scores.softmax(-1) @ wide[2][b, h, at]
            worst = [(x.double() - want).abs().max() for x in (ours.out[b, own], theirs)]
            assert worst[0] <= 2 * worst[1] + 2e-6, worst
            lse = ours.lse[b, own].double()
            torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_the_definition_is_the_per_request_attention(heads, dtype, softcap):
    q, k, v, ids, hot, slots, layout = case(heads, 64, dtype, lengths=[0, 1, 200, 40])
    got = attend_slots(q, hot, slots, layout, 0.1, softcap)
    out, lse = by_request(q, k, v, ids, AttentionSpec(0.1, softcap=softcap))
    assert got.out.dtype == dtype
    assert (got.out[0] == 0).all()
    assert got.lse[0].isneginf().all()
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(got.out[1:], out[1:], **close)
    torch.testing.assert_close(got.lse[1:], lse[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize(("dim", "softcap"), [(64, None), (80, 3.0), (128, None)])
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernel_is_as_good_as_torch(heads, dim, dtype, softcap):
    q, k, v, ids, hot, slots, layout = case(heads, dim, dtype)
    assert_as_good_as_torch(q, k, v, ids, hot, slots, layout, AttentionSpec(0.1, softcap))


@pytest.mark.parametrize("programs", [1, 8, 1000])
@pytest.mark.parametrize("count", [1, 64, 65, 300])
def test_the_number_of_parts_changes_nothing_that_matters(monkeypatch, programs, count):
    monkeypatch.setattr(merging, "PROGRAMS", programs)
    q, _, _, _, hot, slots, layout = case((4, 2), 64, torch.float32, count, [300, 2])
    got = attend_slots_triton(q, hot, slots, layout, 0.1)
    want = attend_slots_torch(q, hot, slots, layout, 0.1)
    torch.testing.assert_close(got.out, want.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)


def test_long_lists_of_short_contexts_end_where_their_last_slot_is(monkeypatch):
    monkeypatch.setattr(merging, "PROGRAMS", 4)
    q, _, _, _, hot, slots, layout = case((4, 2), 64, torch.float32, 1300, [70, 0, 1300])
    slots[0, 1, 1290], slots[0, 1, 3] = slots[0, 1, 3].clone(), -1
    want = attend_slots_torch(q, hot, slots, layout, 0.1)
    for looked_at in (512, 1024):
        monkeypatch.setattr(kernel, "LOOKED_AT", looked_at)
        got = attend_slots_triton(q, hot, slots, layout, 0.1)
        torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-5, atol=1e-5)


def test_absent_slots_may_stand_anywhere():
    q, _, _, _, hot, slots, layout = case((4, 2), 64, torch.float32, 130, [300, 299])
    slots[:, :, ::3] = -1
    slots[0, 1, :70] = -1
    got = attend_slots_triton(q, hot, slots, layout, 0.1)
    for b in range(2):
        for h in range(2):
            rows = slots[b, h][slots[b, h] >= 0]
            one = attend_slots_torch(
                q[b : b + 1, 2 * h : 2 * h + 2],
                hot[b, h][None, None],
                rows[None, None],
                layout,
                0.1,
            )
            ours = [x[b : b + 1, 2 * h : 2 * h + 2] for x in got]
            torch.testing.assert_close(tuple(ours), tuple(one), rtol=1e-5, atol=1e-5)


def test_scores_of_any_size():
    q, _, _, _, hot, slots, layout = case((4, 2), 64, torch.float32, 130, [300, 299])
    for scale, softcap in ((0.0, None), (1e3, None), (1e3, 2.0), (-1e3, 50.0)):
        got = attend_slots_triton(q, hot, slots, layout, scale, softcap)
        want = attend_slots_torch(q, hot, slots, layout, scale, softcap)
        torch.testing.assert_close(got.out, want.out, rtol=0, atol=5e-3 if scale == 1e3 else 1e-5)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)


def test_rows_that_must_be_decoded_are_refused():
    q, _, _, _, hot, slots, layout = case((4, 2), 64, torch.float32, 9, [20])
    for wrong in (
        RowLayout(Raw(torch.float16), Raw(torch.float16), 64, torch.float16),
        RowLayout(Int8(), Raw(torch.float32), 64, torch.float32),
        RowLayout(None, Raw(torch.float32), 64, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"raw keys and values in torch\.float32"):
            attend_slots(q, hot, slots, wrong, 0.1)
    assert kernel.numbers(hot, layout, torch.float32).v_at == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_parts_are_merged_as_those_of_one_request_are(count, dtype):
    generator = torch.Generator().manual_seed(count)
    outs = torch.randn(count, 3, 4, 80, generator=generator).to(dtype)
    lses = 5 * torch.randn(count, 3, 4, generator=generator)
    lses[: count // 2, 1] = -torch.inf
    lses[:, 2] = -torch.inf
    outs[lses.isneginf()] = torch.nan
    for merge_parts in (merge_parts_torch, merge_parts_triton):
        got = merge_parts(outs, lses) if count > 1 else merge_parts(outs[:, :2], lses[:, :2])
        assert got.out.dtype == dtype
        for b in range(2):
            some = [n for n in range(count) if not lses[n, b].isneginf().any()]
            want = merge([Partial(outs[n, b], lses[n, b]) for n in some])
            torch.testing.assert_close((got.out[b], got.lse[b]), tuple(want), rtol=8e-3, atol=1e-6)
        if count > 1:
            assert (got.out[2] == 0).all()
            assert got.lse[2].isneginf().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_on_a_gpu_it_is_as_good_as_torch(dtype, softcap):
    for heads, dim in zip([*HEADS, (8, 8), (32, 8)], cycle((64, 80, 128, 256))):
        made = case(heads, dim, dtype, 1500, [0, 1, 3000, 1499])
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in made]
        assert_as_good_as_torch(*moved, AttentionSpec(0.1, softcap))
        got = attend_slots(moved[0], *moved[4:], 0.1, softcap)
        assert all(x.is_cuda for x in got)
