"""The linear layers of a model, borrowed: its weights, and compiled code where that is faster."""

import copy

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from engine.kernels.project import project_native, serves


class Linear(nn.Module):
    """An `nn.Linear` whose few rows are multiplied in compiled code on a CPU that gains by it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, borrowed: nn.Linear) -> None:
        super().__init__()
        self._parameters = borrowed._parameters  # the same dictionary: new weights are seen, too

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        if not serves(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        out = project_native(x, self.weight)
        return out if self.bias is None else out + self.bias


def borrowed(module: nn.Module) -> nn.Module:
    """A twin of `module` on the same weights whose plain linear layers are `Linear`.

    `module` is left as it is. Layers of other types, and those that somebody hooked, are shared.
    """
    if type(module) is nn.Linear:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return module if hooked else Linear(module)
    if not any(type(part) is nn.Linear for part in module.modules()):
        return module
    twin = copy.copy(module)
    twin._modules = {n: m and borrowed(m) for n, m in module._modules.items()}
    return twin
