"""The compiled RMS norm against its definition and `transformers`', and where it stands back."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from engine.kernels.rms_norm import (
    MOST_VALUES,
    rms_norm_native,
    rms_norm_torch,
    serves,
)
from engine.model.hf import FAMILIES, norm_of
from engine.model.linear import Norm, borrowed_norm


def tensors(shape, size=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    x, w = (torch.randn(n, generator=generator) for n in (shape, shape[-1:]))
    return (size * x).bfloat16(), (1 + w).bfloat16()


def exact(x, w, eps):
    x = x.double()
    return w.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def lender(width=64):
    norm = Qwen3RMSNorm(width, eps=1e-5).bfloat16()
    norm.weight.data = tensors((width,))[1]
    return norm


@pytest.mark.parametrize("shape", [(16,), (1, 48), (3, 64), (2, 8, 80), (1, 16, 128), (5, 1024)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_it_equals_its_definition(compiled, shape, size):
    x, w = tensors(shape, size)
    assert serves(x, w)
    want, torchs = exact(x, w, 1e-6), rms_norm_torch(x, w, 1e-6).double()
    ours = rms_norm_native(x, w, 1e-6)
    assert ours.shape == x.shape
    allowed = 2 * (torchs - want).abs() + 2**-8 * want.abs()  # the definition may round by luck
    assert ((ours.double() - want).abs() <= allowed).all()
    assert (ours.double() == torchs).float().mean() > 0.99  # it rounds where torch does


def test_a_view_whose_rows_lie_apart_is_taken_too(compiled):
    x, w = tensors((4, 3, 64))
    view = x.transpose(0, 1)
    assert torch.equal(rms_norm_native(view, w, 1e-6), rms_norm_native(view.contiguous(), w, 1e-6))


def test_what_is_not_a_number_and_zeros_come_out_as_torch_has_them(compiled):
    x, w = tensors((4, 32))
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    got, want = rms_norm_native(x, w, 1e-6), rms_norm_torch(x, w, 1e-6)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_it_takes_few_rows_of_bf16_and_nothing_else(compiled):
    x, w = tensors((2, 64))
    assert serves(x, w)
    assert not serves(x.float(), w.float())
    assert not serves(x.float(), w)
    assert not serves(*tensors((2, 40)))
    assert not serves(*tensors((MOST_VALUES // 64 + 1, 64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_borrowed_norm_computes_the_same_and_sees_weights_that_move(dtype):
    norm = lender()
    twin, x = borrowed_norm(norm), tensors((2, 64))[0].to(dtype)
    assert type(twin) is Norm
    for module in (norm, norm.to(dtype)):
        torch.testing.assert_close(twin(x), module(x), rtol=2**-7, atol=1e-6)
    norm.weight = nn.Parameter(torch.zeros(64, dtype=dtype))
    assert not twin(x).any()


def test_a_borrowed_norm_uses_its_lenders_epsilon(compiled):
    norm, x = lender(), tensors((1, 64), 1e-3)[0]
    torch.testing.assert_close(borrowed_norm(norm)(x), norm(x), rtol=2**-7, atol=0)


def test_a_hooked_norm_is_shared_so_that_its_hook_runs():
    norm, seen = lender(), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    borrowed_norm(norm)(tensors((1, 64))[0])
    assert seen == [1]


def test_families_whose_norms_differ_keep_their_own():
    kept = {name for name, family in FAMILIES.items() if not family.plain_norm}
    assert kept == {"gemma2", "gemma3_text", "gemma3n_text", "olmo2"}
    norm = Gemma2RMSNorm(64)
    assert norm_of(norm, FAMILIES["gemma2"]) is norm
    assert type(norm_of(lender(), FAMILIES["qwen3"])) is Norm
