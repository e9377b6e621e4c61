"""Linear layers and norms of a model, borrowed: its weights, and compiled code if faster."""

import copy

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from engine.kernels import project, rms_norm


class Linear(nn.Module):
    """An `nn.Linear` whose few rows are multiplied in compiled code on a CPU that gains by it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, borrowed: nn.Linear) -> None:
        super().__init__()
        self._parameters = borrowed._parameters  # the same dictionary: new weights are seen, too

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        if not project.serves(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        out = project.project_native(x, self.weight)
        return out if self.bias is None else out + self.bias


class Norm(nn.Module):
    """An RMS norm like Llama's, in compiled code: of few rows on a CPU, of all on a GPU.

    Whatever that does not serve is the lender's own business.
    """

    weight: Tensor

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self._parameters = lender._parameters  # as above
        self._lender = [lender]  # in a list: its parameters are not listed twice
        self._eps = float(lender.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n I"]:
        if rms_norm.serves(x, self.weight):
            return rms_norm.rms_norm_native(x, self.weight, self._eps)
        if rms_norm.fits(x, self.weight):
            from engine.kernels.norm_rows import norm_rows  # needs triton: not where no GPU is

            return norm_rows(x, self.weight, self._eps)
        out: Tensor = self._lender[0](x)
        return out


def borrowed(module: nn.Module) -> nn.Module:
    """A twin of `module` on the same weights whose plain linear layers are `Linear`.

    `module` is left as it is. Layers of other types, and those that somebody hooked, are shared.
    """
    if type(module) is nn.Linear:
        return module if _hooked(module) else Linear(module)
    if not any(type(part) is nn.Linear for part in module.modules()):
        return module
    twin = copy.copy(module)
    twin._modules = {n: m and borrowed(m) for n, m in module._modules.items()}
    return twin


def borrowed_norm(norm: nn.Module) -> nn.Module:
    """A twin on the same weights of an RMS norm like Llama's; one that is hooked is shared."""
    return norm if _hooked(norm) else Norm(norm)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
