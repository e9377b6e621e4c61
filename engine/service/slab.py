"""The working set of one request in one piece, which can be taken away and brought back."""

import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import DenseCache
from engine.errors import EngineError
from engine.model.pieces import Shape
from engine.recorder import Recorder
from kvstore.block import LayerKV
from native.pages import own_pages


class SlabCache(DenseCache):
    """As `SequenceCache`, in one tensor for the request's whole length: few copies move it.

    On a CPU the slab is in pages of its own: they take memory as they are written to, and the
    system has them back when it is unloaded.

    Args:
        capacity: tokens there is room for, and no more.
    """

    def __init__(self, shape: Shape, capacity: int, recorder: Recorder | None = None) -> None:
        super().__init__(recorder)
        self.shape, self.capacity = shape, max(1, capacity)
        self._slab: Tensor | None = self.empty()

    @property
    def loaded(self) -> bool:
        """Whether its KV is here, to be attended to."""
        return self._slab is not None

    @property
    def slab(self) -> Float[Tensor, "L 2 Hk C D"]:
        """K and V of every layer. EngineError while they are elsewhere."""
        if self._slab is None:
            raise EngineError("this request's KV is not on the device: bring it back first")
        return self._slab

    @property
    def nbytes(self) -> int:
        """Of the slab on the model's device, while it is there."""
        return self.capacity * self.shape.kv_bytes_per_token if self.loaded else 0

    def buffers(self, layer: int, tokens: int) -> LayerKV:
        """A layer of the slab. ValueError if it has no room for so many tokens."""
        if tokens > self.capacity:
            raise ValueError(f"this cache has room for {self.capacity} tokens, not for {tokens}")
        k, v = self.slab[layer]
        return LayerKV(k, v)

    def empty(self) -> Float[Tensor, "L 2 Hk C D"]:
        """A slab for this request, not loaded."""
        s = self.shape
        size = (s.num_layers, 2, s.num_kv_heads, self.capacity, s.head_dim)
        if s.device.type == "cpu":
            return own_pages(size, s.dtype)
        with torch.inference_mode(False):  # whoever writes later need not be in that mode
            return torch.empty(size, dtype=s.dtype, device=s.device)

    def unload(self) -> None:
        """Free the slab. Its KV must be elsewhere, or never be asked for again."""
        self._slab = None

    def load(self, slab: Float[Tensor, "L 2 Hk C D"]) -> None:
        """Take a slab that has the KV of all `length` tokens."""
        self._slab = slab

    def close(self) -> None:
        """Free the slab. Idempotent."""
        self.unload()
