"""Muon: steps of equal size in all directions."""

import pytest
import torch
from torch import nn

from evals.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonal(torch.randn(3, *shape)).float())
    assert (found > 0.5).float().mean() > 0.9  # the least of a square matrix starts near 0
    assert found.max() < 1.4


def test_directions_stay():
    matrix = torch.randn(16, 16)
    u, _, v = torch.linalg.svd(matrix)
    assert (orthogonal(matrix[None])[0].float() * (u @ v)).sum() > 0.9 * 16 * 0.7


def test_a_stack_is_as_one_by_one():
    matrices = torch.randn(4, 12, 20)
    alone = torch.cat([orthogonal(matrix[None]) for matrix in matrices])
    assert torch.allclose(orthogonal(matrices).float(), alone.float(), atol=0.05)


def test_steps_go_against_the_gradient_at_the_rate():
    weight = nn.Parameter(torch.zeros(10, 10))
    optimizer = Muon([weight], 0.1)
    weight.grad = torch.eye(10)
    optimizer.step()
    assert -0.12 < weight.diagonal().mean() < -0.06


def test_what_has_no_gradient_stays():
    weight = nn.Parameter(torch.ones(4, 4))
    Muon([weight], 0.1).step()
    assert torch.equal(weight, torch.ones(4, 4))
