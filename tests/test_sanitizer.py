"""The sanitizer finds what is wrong in a kernel, and nothing in one that is right."""

import pytest
import torch
import triton
import triton.language as tl

from native.gpu import interpreted
from tests.sanitizer import Hazard

pytestmark = pytest.mark.skipif(not interpreted(), reason="for Triton's interpreter")


@triton.jit
def _sound(x, y, total, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))
    tl.debug_barrier()
    other = tl.program_id(0) * N + (tl.arange(0, N) + 1) % N
    tl.atomic_add(total, tl.sum(tl.load(y + other), 0))


@triton.jit
def _outside(x, y, total, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N) + tl.num_programs(0) * N - 1))


@triton.jit
def _below(x, y, total, N: tl.constexpr):
    tl.store(y - 1 + tl.arange(0, N), 0.0)


@triton.jit
def _same(x, y, total, N: tl.constexpr):
    tl.store(total, 1.0)


@triton.jit
def _neighbour(x, y, total, N: tl.constexpr):
    p, at = tl.program_id(0), tl.arange(0, N)
    tl.store(y + p * N + at, tl.load(y + (p ^ 1) * N + at))


@triton.jit
def _sum(x, y, total, N: tl.constexpr):
    tl.atomic_add(total, 1.0)
    tl.store(y + tl.program_id(0), tl.load(total))


@triton.jit
def _read_behind(x, y, total, N: tl.constexpr):
    p, at = tl.program_id(0), tl.arange(0, N)
    tl.store(y + p * N + at, 1.0)
    tl.store(x + p * N + at, tl.load(y + p * N + (at + 1) % N))


@triton.jit
def _read_before(x, y, total, N: tl.constexpr):
    p, at = tl.program_id(0), tl.arange(0, N)
    one = tl.load(y + p * N + (at + 1) % N)
    tl.store(y + p * N + at, one)


@triton.jit
def _twice(x, y, total, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + tl.program_id(0) + at * 0, at.to(tl.float32))


@triton.jit
def _masked(x, y, total, N: tl.constexpr):
    p, at = tl.program_id(0), tl.arange(0, N)
    tl.store(y + p * N + at, tl.load(x + p * N + at, mask=at < 2))


def run(kernel):
    """The kernel on two programs, with eight numbers each."""
    x, y, total = torch.ones(16), torch.zeros(16), torch.zeros(1)
    kernel[(2,)](x, y, total, N=8)
    return y, total


def test_a_sound_kernel_has_no_hazard():
    y, total = run(_sound)
    assert y.tolist() == [1] * 16
    assert total.item() == 16


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (_outside, "loads outside of all tensors"),
        (_below, "stores outside of all tensors"),
        (_same, "stores: of two programs"),
        (_neighbour, "loads and .* stores: of two programs"),
        (_sum, "updates and .* loads: of two programs"),
        (_read_behind, "stores and .* loads: with no barrier between"),
        (_read_before, "loads and .* stores: with no barrier between"),
        (_twice, "stores: two values at once"),
    ],
)
def test_a_hazard_is_found_where_it_is(kernel, words):
    with pytest.raises(Hazard, match=rf"{kernel.fn.__name__}\n.*test_sanitizer.py:\d+ .*{words}"):
        run(kernel)


def test_what_is_masked_without_a_value_is_no_zero():
    y, _ = run(_masked)
    assert y[:2].tolist() == [1, 1]
    assert y[2:8].isnan().all()
