"""The model as a bag of pieces. It has no forward(): the loops in this package own the order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.model.rope import Rope


class QKV(NamedTuple):
    """Projections of N tokens in one layer, all unrotated; Hk is 0 where it makes no KV."""

    q: Float[Tensor, "Hq N D"]
    k: Float[Tensor, "Hk N D"]
    v: Float[Tensor, "Hk N D"]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How a layer attends.

    Args:
        scale: factor on q·k.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2); None for none.
        window: a token sees itself and the window - 1 before it; None sees everything.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes every cache and block of a model depends on.

    Args:
        num_layers: with KV of their own: a model may have more, see `Layer`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers that have some."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@runtime_checkable
class Layer(Protocol):
    """One decoder layer; every operation is per token, so N tokens may be of N requests.

    owner: the number of the KV that it attends to, by which caches and blocks know it: KV is
        counted in the order of the layers that make it.
    owns: whether it makes that KV; else an earlier layer does, with the same rope and attention.
    """

    attention: AttentionSpec
    rope: Rope
    owner: int
    owns: bool

    def qkv(self, x: Float[Tensor, "N E"]) -> QKV: ...
    def finish(
        self, x: Float[Tensor, "N E"], heads: Float[Tensor, "Hq N D"]
    ) -> Float[Tensor, "N E"]: ...


@runtime_checkable
class Model(Protocol):
    """What the loops need of a model.

    static_shapes: whether no operation depends on values, so that a step can be a CUDA graph.
    """

    shape: Shape

    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def static_shapes(self) -> bool: ...
    def embed(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N E"]: ...
    def logits(self, x: Float[Tensor, "N E"]) -> Float[Tensor, "N vocab"]: ...


def owners(model: Model) -> list[Layer]:
    """The layers that make KV, by its number."""
    return [layer for layer in model.layers if layer.owns]


def kv_depth(model: Model) -> int:
    """How many layers it takes until all KV of a token is made.

    Behind them only tokens whose logits are wanted have to go on (SwiftKV, 2024).
    """
    return max(i for i, layer in enumerate(model.layers) if layer.owns) + 1
