"""Queries and keys of a batch against each request's own rotation."""

import pytest
import torch

from engine.kernels.rotate_rows import rotate_rows, rotate_rows_torch, rotate_rows_triton
from engine.model.rope import Rope

ALLOWED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = [(64, 32), (64, 8), (80, 40), (128, 48), (2, 1)]  # dims, and half of those that turn


def case(heads, dim, half, dtype, *, interleaved):
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(3, h, dim, generator=generator).to(dtype) for h in heads)
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    rope = Rope(frequencies, scaling=1.25, interleaved=interleaved)
    return q, k, rope, rope.table(torch.tensor([0, 5, 70_000]))


@pytest.mark.parametrize("rotate", [rotate_rows_torch, rotate_rows_triton])
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(8, 2), (3, 3)])
def test_each_request_is_rotated_to_its_own_position(rotate, dtype, interleaved, heads):
    for dim, half in KINDS:
        q, k, rope, table = case(heads, dim, half, dtype, interleaved=interleaved)
        got = rotate(q, k, *table, interleaved=interleaved)
        for ours, x in zip(got, (q, k)):
            assert ours.is_contiguous()
            assert ours.dtype == dtype
            want = rope.rotate(x.transpose(0, 1), table).transpose(0, 1)
            torch.testing.assert_close(ours, want, rtol=ALLOWED[dtype], atol=ALLOWED[dtype])
            assert torch.equal(ours[..., 2 * half :], x[..., 2 * half :])


def test_views_of_what_a_projection_made_are_taken_too():
    q, k, _, table = case((8, 2), 64, 32, torch.float32, interleaved=False)
    views = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    want = rotate_rows_triton(q, k, *table, interleaved=False)
    got = rotate_rows_triton(*views, *table, interleaved=False)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_tensors_of_a_cpu_go_to_the_definition():
    q, k, _, table = case((8, 2), 64, 32, torch.bfloat16, interleaved=False)
    want = rotate_rows_torch(q, k, *table, interleaved=False)
    got = rotate_rows(q, k, *table, interleaved=False)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("interleaved", [False, True])
def test_on_a_gpu_it_equals_its_definition(dtype, interleaved):
    for dim, half in KINDS:
        q, k, _, table = case((32, 8), dim, half, dtype, interleaved=interleaved)
        want = rotate_rows_torch(q, k, *table, interleaved=interleaved)
        got = rotate_rows(*(x.cuda() for x in (q, k, *table)), interleaved=interleaved)
        for ours, theirs in zip(got, want):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=ALLOWED[dtype], atol=ALLOWED[dtype])
