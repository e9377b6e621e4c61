"""What one request attends to: rotated keys and values, layer by layer."""

import torch
from jaxtyping import Float
from torch import Tensor

from engine.model import Shape
from engine.recorder import Recorder
from kvstore.block import LayerKV


class SequenceCache:
    """The working set of one request, in buffers that are written in place.

    Keys here are rotated (a dense step must not rotate its whole context); what the store gets
    are the unrotated ones, through `recorder`.

        [0, length) complete in every layer   [length, length + N) being written by a loop

    Args:
        capacity: tokens to make room for at once; the buffers grow beyond it by half.
        recorder: takes the unrotated KV of new tokens; None where nothing is stored.
    """

    def __init__(self, shape: Shape, capacity: int, recorder: Recorder | None = None) -> None:
        self.length = 0
        self.recorder = recorder
        self._shape = shape
        self._capacity = max(1, capacity)
        self._k = [self._buffer() for _ in range(shape.num_layers)]
        self._v = [self._buffer() for _ in range(shape.num_layers)]

    def append(
        self,
        layer: int,
        k: Float[Tensor, "Hk N D"],
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV:
        """Write N tokens after `length` in one layer; returns all tokens of that layer, a view."""
        if self.recorder is not None:
            self.recorder.write(layer, self.length, k, v)
        return self.write(layer, self.length, rotated, v)

    def write(
        self,
        layer: int,
        start: int,
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV:
        """Write N rotated keys and values at `start`; returns tokens [0, start + N), a view."""
        stop = start + v.shape[1]
        self._reserve(stop)
        self._k[layer][:, start:stop] = rotated
        self._v[layer][:, start:stop] = v
        return LayerKV(self._k[layer][:, :stop], self._v[layer][:, :stop])

    def advance(self, count: int) -> None:
        """Declare `count` more tokens complete in every layer."""
        self.length += count

    def _buffer(self) -> Float[Tensor, "Hk capacity D"]:
        s = self._shape
        size = (s.num_kv_heads, self._capacity, s.head_dim)
        return torch.empty(size, dtype=s.dtype, device=s.device)

    def _reserve(self, tokens: int) -> None:
        if tokens <= self._capacity:
            return
        self._capacity = max(tokens, self._capacity + self._capacity // 2)
        for buffers in (self._k, self._v):
            for i, old in enumerate(buffers):
                buffers[i] = self._buffer()
                buffers[i][:, : old.shape[1]] = old
