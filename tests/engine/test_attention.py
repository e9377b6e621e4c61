"""Dense attention against a softmax written out in float64."""

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import attention
from engine.attention import attend_chunk, attend_chunk_fused, attend_chunk_split, attend_token
from engine.model.pieces import AttentionSpec

HEADS = pytest.mark.parametrize(("hq", "hk"), [(4, 4), (8, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
DIM = pytest.mark.parametrize("dim", [64, 80, 128])
LENGTH = pytest.mark.parametrize("length", [1, 127, 300])
KIND = pytest.mark.parametrize(
    ("window", "softcap"),
    [(None, None), (1, None), (50, None), (1000, None), (None, 2.0), (50, 2.0)],
)


def reference(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention of the last N of S tokens, one head after the other, in float64."""
    (hq, n, _), (hk, s, _) = q.shape, k.shape
    i, j = torch.arange(s - n, s)[:, None], torch.arange(s)
    hidden = (j > i) | (j <= i - (spec.window or s))
    out = []
    for head in range(hq):
        own = head // (hq // hk)
        scores = q[head].double() @ k[own].double().T * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        out.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[own].double())
    return torch.stack(out)


def tensors(hq: int, hk: int, n: int, length: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of the last n tokens, k and v of all; scores spread enough that single tokens matter."""
    generator = torch.Generator().manual_seed(length * dim + hq)
    q = 2 * torch.randn(hq, n, dim, generator=generator)
    k, v = (torch.randn(hk, length, dim, generator=generator) for _ in range(2))
    return q, k, v


def test_the_reference_is_torchs_own_attention() -> None:
    q, k, v = tensors(4, 4, 60, 60, 64)
    theirs = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(reference(q, k, v, AttentionSpec(scale=64**-0.5)), theirs)


@HEADS
@DIM
@LENGTH
@KIND
def test_one_token_attends_as_written_out(
    hq: int, hk: int, dim: int, length: int, window: int | None, softcap: float | None
) -> None:
    spec = AttentionSpec(scale=dim**-0.5, softcap=softcap, window=window)
    q, k, v = tensors(hq, hk, 1, length, dim)
    out = attend_token(q[:, 0], k, v, spec)
    torch.testing.assert_close(out, reference(q, k, v, spec)[:, 0].float(), atol=2e-6, rtol=1e-5)


@HEADS
@DIM
@LENGTH
@KIND
def test_a_chunk_attends_as_written_out(
    hq: int, hk: int, dim: int, length: int, window: int | None, softcap: float | None
) -> None:
    spec = AttentionSpec(scale=dim**-0.5, softcap=softcap, window=window)
    q, k, v = tensors(hq, hk, min(45, length), length, dim)
    out = attend_chunk(q, k, v, spec)
    torch.testing.assert_close(out, reference(q, k, v, spec).float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (50, None), (None, 2.0), (50, 2.0)])
def test_a_chunk_taken_in_runs_is_the_chunk_at_once(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = AttentionSpec(scale=0.1, softcap=softcap, window=window)
    q, k, v = tensors(8, 2, 100, 127, 64)
    at_once = attend_chunk(q, k, v, spec)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 1)  # runs of 16 queries, the last one of 4
    torch.testing.assert_close(attend_chunk(q, k, v, spec), at_once)


@pytest.mark.parametrize("n", [1, 40, 300])
@HEADS
def test_what_a_gpu_takes_in_one_go_is_the_same_chunk(hq: int, hk: int, n: int) -> None:
    q, k, v = tensors(hq, hk, n, 300, 64)
    spec = AttentionSpec(64**-0.5)
    got = attend_chunk_fused(q, k, v, spec)
    torch.testing.assert_close(got.double(), reference(q, k, v, spec), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 40, 300])
@HEADS
@DIM
def test_a_chunk_and_what_is_before_it_are_the_chunk_behind_a_mask(
    hq: int, hk: int, n: int, dim: int
) -> None:
    q, k, v = tensors(hq, hk, n, 300, dim)
    spec = AttentionSpec(dim**-0.5)
    for kind, allowed in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        x = [each.to(kind) for each in (q, k, v)]
        masked = attention._attend_run(*x, spec, 0, n)
        torch.testing.assert_close(attend_chunk_split(*x, spec), masked, rtol=0, atol=allowed)
    narrow = [each.bfloat16() for each in (q, k, v)]
    exact = reference(*narrow, spec)
    theirs = (attention._attend_run(*narrow, spec, 0, n).double() - exact).norm()
    assert (attend_chunk_split(*narrow, spec).double() - exact).norm() <= 2 * theirs


@pytest.mark.parametrize("apart", range(3))
def test_numbers_of_a_token_may_lie_apart(apart: int) -> None:
    q, k, v = tensors(8, 2, 45, 127, 64)
    given, spec = [q, k, v], AttentionSpec(0.1)
    given[apart] = given[apart].mT.contiguous().mT
    torch.testing.assert_close(attend_chunk(*given, spec), attend_chunk(q, k, v, spec))


def test_nothing_is_asked_of_cudnn_whoever_else_attends() -> None:
    enabled, began, seen = torch.backends.cuda.cudnn_sdp_enabled, threading.Event(), []

    def attend() -> None:
        with attention.without_cudnn():
            began.set()
            seen.append(enabled())

    other = threading.Thread(target=attend)
    with attention.without_cudnn():
        other.start()
        assert not began.wait(0.1)  # else it would find allowed what was given back meanwhile
        seen.append(enabled())
    other.join()
    assert seen == [False] * 2
    assert enabled()  # others may want it


def test_what_somebody_forbade_beside_cudnn_stays_forbidden() -> None:
    with sdpa_kernel(SDPBackend.MATH), attention.without_cudnn():
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.gpu
def test_on_a_gpu_it_is_flash_attention_that_answers() -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(8, 2, 40, 100, 64))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        attend_chunk(q, k, v, AttentionSpec(0.1))
        torch.cuda.synchronize()
    names = [event.key.lower() for event in profile.key_averages()]
    assert any("flash" in name for name in names), names
    assert not any("cudnn" in name for name in names), names


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 200, 700])
def test_on_a_gpu_a_chunk_in_bf16_errs_at_most_twice_as_much_as_torch(n: int) -> None:
    q, k, v = tensors(8, 2, n, 700, 128)
    spec, narrow = AttentionSpec(128**-0.5), [x.to("cuda", torch.bfloat16) for x in (q, k, v)]
    want = reference(*(x.double().cpu() for x in narrow), spec)
    theirs = (attend_chunk(*(x.cpu() for x in narrow), spec).double() - want).abs().max()
    ours = (attend_chunk(*narrow, spec).cpu().double() - want).abs().max()
    assert ours <= 2 * theirs


def test_keys_of_a_cache_with_room_to_spare_are_read_in_place() -> None:
    spec = AttentionSpec(scale=0.1)
    q, k, v = tensors(8, 2, 1, 127, 64)
    roomy = [torch.full((2, 300, 64), float("nan")) for _ in range(2)]
    for buffer, x in zip(roomy, (k, v)):
        buffer[:, :127] = x
    out = attend_token(q[:, 0], roomy[0][:, :127], roomy[1][:, :127], spec)
    torch.testing.assert_close(out, reference(q, k, v, spec)[:, 0].float(), atol=2e-6, rtol=1e-5)


@DIM
@LENGTH
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bf16_errs_at_most_twice_as_much_as_torch(
    dim: int, length: int, softcap: float | None
) -> None:
    spec = AttentionSpec(scale=dim**-0.5, softcap=softcap)
    q, k, v = (x.bfloat16() for x in tensors(8, 2, min(45, length), length, dim))
    exact = reference(q, k, v, spec)
    theirs = _torch_bf16(q, k, v, spec)
    allowed = 2 * (theirs.double() - exact).norm()
    assert (attend_chunk(q, k, v, spec).double() - exact).norm() <= allowed
    last = (theirs[:, -1].double() - exact[:, -1]).norm()
    assert (attend_token(q[:, -1], k, v, spec).double() - exact[:, -1]).norm() <= 2 * last


def _torch_bf16(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """What a model in eager bf16 computes."""
    n, s, group = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.mT * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    hidden = torch.arange(s) > torch.arange(s - n, s)[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).float().softmax(-1)
    return weights.to(q.dtype) @ v
