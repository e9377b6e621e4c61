"""The compiled product of few rows against its definition, and where it stands back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.kernels.project import MOST_ROWS, project_native, serves
from engine.model.linear import Linear, borrowed


def tensors(rows, width, outs):
    generator = torch.Generator().manual_seed(rows * width + outs)
    x, w = (torch.randn(n, width, generator=generator) for n in (rows, outs))
    return x.bfloat16(), w.bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("width", [16, 48, 64, 80, 1024])
@pytest.mark.parametrize("outs", [1, 3, 4, 127, 300])
def test_it_equals_its_definition(compiled, rows, width, outs):
    x, w = tensors(rows, width, outs)
    want = x.double() @ w.double().T
    ours = (project_native(x, w).double() - want).abs().max()
    assert ours <= 2 * (F.linear(x, w).double() - want).abs().max() + 1e-6


def test_a_row_longer_than_a_page_and_any_shape_of_x(compiled):
    x, w = tensors(2, 16 * 701, 6)
    torch.testing.assert_close(project_native(x.view(1, 2, -1), w), F.linear(x, w)[None])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(compiled, threads):
    x, w = tensors(2, 256, 1001)
    before, want = torch.get_num_threads(), project_native(x, w)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(project_native(x, w), want)
    finally:
        torch.set_num_threads(before)


def test_it_takes_few_rows_of_contiguous_bf16_and_nothing_else(compiled):
    x, w = tensors(MOST_ROWS, 64, 8)
    assert serves(x, w)
    assert not serves(tensors(MOST_ROWS + 1, 64, 8)[0], w)
    assert not serves(x.float(), w.float())
    assert not serves(x, w.T.contiguous().T)
    assert not serves(*tensors(1, 40, 8))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).relu())


def test_a_borrowed_module_computes_the_same_and_leaves_the_lender_alone(compiled):
    torch.manual_seed(0)
    module = Block().bfloat16()
    twin, x = borrowed(module), torch.randn(1, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(twin(x), module(x), rtol=0, atol=2e-2)
    assert type(twin.up) is Linear
    assert type(module.up) is nn.Linear
    assert twin.norm is module.norm
    assert twin.up.weight is module.up.weight


def test_a_borrowed_module_sees_weights_that_move(compiled):
    module = Block().bfloat16()
    twin = borrowed(module)
    module.float()
    module.up.weight = nn.Parameter(torch.zeros(64, 32))
    module.up.bias = nn.Parameter(torch.zeros(64))
    assert not twin(torch.randn(1, 32)).any()


def test_a_hooked_layer_is_shared_so_that_its_hook_runs():
    module, seen = Block(), []
    module.up.register_forward_hook(lambda *_: seen.append(1))
    borrowed(module)(torch.randn(1, 32))
    assert seen == [1]
