"""Muon (Jordan et al. 2024): momentum made orthogonal, for the matrices inside the layers."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

DECAY, MOMENTUM = 0.01, 0.95
ROUNDS = 5
# of the quintic whose repetition drives singular values towards 1 (Jordan et al. 2024)
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Steps of equal size in every direction of a matrix; matrices of one shape go together."""

    def __init__(self, matrices: Iterable[nn.Parameter], rate: float):
        super().__init__(matrices, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for matrices in alike.values():
                self._update(matrices, group["lr"])

    def _update(self, matrices: list[nn.Parameter], rate: float) -> None:
        wanted = []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix)
            assert matrix.grad is not None, "chosen for their gradients"
            state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
            wanted.append(matrix.grad.lerp(state["momentum"], MOMENTUM))
        rows, columns = matrices[0].shape
        size = rate * max(1.0, rows / columns) ** 0.5
        for matrix, step in zip(matrices, orthogonal(torch.stack(wanted)), strict=True):
            matrix.mul_(1 - rate * DECAY).add_(step.to(matrix.dtype), alpha=-size)


def orthogonal(matrices: Float[Tensor, "N rows columns"]) -> Float[Tensor, "N rows columns"]:
    """Each matrix with its singular values brought near 1, in bf16."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
