"""The RMS norm of a GPU against its definition, which is that of a CPU."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from engine.kernels.norm_rows import norm_rows, norm_rows_triton
from engine.kernels.rms_norm import MOST_WIDTH, fits, rms_norm_torch

ALLOWED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two roundings


def tensors(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    x, w = (torch.randn(n, generator=generator) for n in (shape, shape[-1:]))
    return (3 * x).to(device, dtype), (1 + w).to(device, dtype)


def check(x, w):
    got, want = norm_rows_triton(x, w, 1e-5), rms_norm_torch(x, w, 1e-5)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(got, want, rtol=ALLOWED[x.dtype], atol=1e-6)
    if x.numel() and (x.is_cuda or x.dtype == torch.float16):  # the interpreter cuts bf16 off
        assert (got == want).float().mean() > 0.99  # it rounds where torch does


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 1), (5, 127), (2, 7, 80), (2, MOST_WIDTH)])
def test_it_equals_its_definition(shape, dtype):
    check(*tensors(shape, dtype))


def test_a_view_whose_rows_lie_apart_is_taken_too():
    x, w = tensors((4, 3, 64), torch.float32)
    check(x.transpose(0, 1), w)


def test_it_is_launched_where_its_tensors_are(monkeypatch):
    """Threads begin on the first GPU, and Triton launches there, wherever the model is."""
    (x, w), seen = tensors((3, 64), torch.float32), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext(seen.append(tensor)))
    norm_rows_triton(x, w, 1e-5)
    assert len(seen) == 1
    assert seen[0] is x


def test_what_is_not_a_number_and_zeros_come_out_as_torch_has_them():
    x, w = tensors((4, 32), torch.float16)
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    with np.errstate(invalid="ignore"):  # the interpreter's
        got, want = norm_rows_triton(x, w, 1e-6), rms_norm_torch(x, w, 1e-6)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_tensors_of_a_cpu_go_to_the_definition():
    x, w = tensors((3, 64), torch.bfloat16)
    assert not fits(x, w)
    assert torch.equal(norm_rows(x, w, 1e-5), rms_norm_torch(x, w, 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALLOWED)
def test_on_a_gpu_it_equals_its_definition(dtype):
    for shape in ((8, 4096), (300, 5120), (2, 9, 128), (3, 80)):
        x, w = tensors(shape, dtype, "cuda")
        assert fits(x, w)
        check(x, w)
        assert torch.equal(norm_rows(x, w, 1e-5), norm_rows_triton(x, w, 1e-5))
    assert not fits(x.requires_grad_(), w)
    assert not fits(x.detach().double(), w)
    assert not fits(*tensors((1, MOST_WIDTH + 1), dtype, "cuda"))
