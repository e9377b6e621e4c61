"""Attention of scattered tokens: the kernel, its mask, and what it does not read."""

import pytest
import torch

from engine.blend import runs
from engine.blend.runs import Runs
from engine.kernels import attend_runs as kernel
from engine.kernels.attend_runs import attend_runs, attend_runs_torch, attend_runs_triton
from engine.model.pieces import AttentionSpec

SPECS = {
    "plain": AttentionSpec(0.2),
    "window": AttentionSpec(0.2, window=9),
    "softcap": AttentionSpec(0.2, softcap=2.0),
    "window and softcap": AttentionSpec(0.2, softcap=2.0, window=70),
}
POSITIONS = {
    "one": [126],
    "first": [0],
    "all": list(range(20)),
    "runs": [*range(5), *range(40, 56), *range(60, 61), *range(145, 150)],
    "apart": [0, 3, 50, 51, 90, 149],
}
HEADS = [(2, 2), (3, 1), (4, 1), (8, 1)]  # groups of 1, 3, 4 and 8


def inputs(positions, heads=(4, 2), dim=64, dtype=torch.float32, count=150, device="cpu"):
    generator = torch.Generator().manual_seed(count + dim)
    q = 2 * torch.randn(heads[0], len(positions), dim, generator=generator)
    k, v = (torch.randn(heads[1], count, dim, generator=generator) for _ in range(2))
    at = torch.tensor(positions, device=device)
    return *(x.to(device, dtype) for x in (q, k, v)), at


def run(attend, q, k, v, at, spec):
    return attend(q, k, v, at, spec.scale, spec.softcap, spec.window)


def exact(q, k, v, at, spec):
    """In double precision."""
    i, j = at[:, None], torch.arange(k.shape[1], device=at.device)
    hidden = (j > i) | (j <= i - (spec.window or k.shape[1]))
    k, v = (x.double().repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q.double() @ k.mT * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def assert_as_good_as_torch(q, k, v, at, spec):
    """At most twice the error of torch in the same dtype, on the CPU."""
    want = exact(q, k, v, at, spec)
    theirs = Runs(at.cpu(), q.dtype).attend(q.cpu(), k.cpu(), v.cpu(), spec).to(q.device)
    ours = run(attend_runs_triton, q, k, v, at, spec)
    worst = [(x.double() - want).abs().max() for x in (ours, theirs)]
    assert worst[0] <= 2 * worst[1] + 2e-6, worst


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("where", POSITIONS)
def test_the_definition_is_what_runs_on_a_cpu(spec, where):
    q, k, v, at = inputs(POSITIONS[where])
    want = Runs(at, q.dtype).attend(q, k, v, SPECS[spec])
    torch.testing.assert_close(run(attend_runs, q, k, v, at, SPECS[spec]), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("where", POSITIONS)
def test_the_kernel_equals_its_definition(spec, where, dtype):
    q, k, v, at = inputs(POSITIONS[where], dtype=dtype)
    want = run(attend_runs_torch, q, k, v, at, SPECS[spec])
    got = run(attend_runs_triton, q, k, v, at.int(), SPECS[spec])
    close = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert_as_good_as_torch(q, k, v, at, SPECS[spec])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_any_group_and_head_size(heads, dim, dtype):
    """Tiles begin and end in the middle of a token's group."""
    positions = [*range(30, 41), *range(70, 77)]
    for spec in ("plain", "window"):
        q, k, v, at = inputs(positions, heads, dim, dtype, count=77)
        assert_as_good_as_torch(q, k, v, at, SPECS[spec])


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_behind_the_last_position_is_not_read(spec):
    q, k, v, at = inputs([3, 70, 90])
    want = [run(f, q, k, v, at, SPECS[spec]) for f in (attend_runs_torch, attend_runs_triton)]
    k[:, 91:], v[:, 91:] = torch.nan, torch.nan
    got = [run(f, q, k, v, at, SPECS[spec]) for f in (attend_runs_torch, attend_runs_triton)]
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])


def test_a_later_token_changes_no_earlier_output():
    q, k, v, at = inputs(POSITIONS["runs"])
    before = run(attend_runs_triton, q, k, v, at, SPECS["plain"])
    k[:, 50], v[:, 50] = 100.0, 100.0
    after = run(attend_runs_triton, q, k, v, at, SPECS["plain"])
    changed = (before != after).any(-1).any(0)
    assert torch.equal(changed, at >= 50)


def test_rows_may_lie_apart():
    """Keys as views of a longer cache, queries and keys as [tokens, heads, D]."""
    q, k, v, at = inputs(POSITIONS["apart"])
    want = run(attend_runs_triton, q, k, v, at, SPECS["plain"])
    longer = [torch.full((2, 183, 64), torch.nan) for _ in range(2)]
    for long, x in zip(longer, (k, v)):
        long[:, 16:166] = x
    views = [x[:, 16:166] for x in longer]
    by_token = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    by_number = [x.mT.contiguous().mT for x in (q, k, v)]
    odd = [torch.nn.functional.pad(x, (0, 1))[..., :64] for x in (q, k, v)]
    for given in ((q, *views), by_token, by_number, odd):
        assert torch.equal(run(attend_runs_triton, *given, at, SPECS["plain"]), want)


def test_on_a_gpu_the_engine_asks_the_kernel_and_makes_no_mask(monkeypatch):
    monkeypatch.setattr(runs, "on_gpu", lambda *tensors: True)
    monkeypatch.setattr(kernel, "on_gpu", lambda *tensors: True)
    monkeypatch.setattr(Runs, "_group", lambda *_: pytest.fail("a mask was made"))
    q, k, v, at = inputs(POSITIONS["runs"])
    for spec in SPECS.values():
        got = Runs(at, q.dtype).attend(q, k, v, spec)
        torch.testing.assert_close(got, exact(q, k, v, at, spec).float(), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS)
def test_on_a_gpu_it_is_as_good_as_torch(spec, dtype):
    positions = [*range(16), *range(400, 464), 700, *range(1800, 1999)]
    for heads, dim in (((4, 4), 64), ((6, 2), 80), ((8, 2), 128), ((8, 1), 256), ((8, 1), 128)):
        q, k, v, at = inputs(positions, heads, dim, dtype, 2000, "cuda")
        assert_as_good_as_torch(q, k, v, at, SPECS[spec])
        assert torch.equal(
            Runs(at, dtype).attend(q, k, v, SPECS[spec]),
            run(attend_runs_triton, q, k, v, at, SPECS[spec]),
        )
