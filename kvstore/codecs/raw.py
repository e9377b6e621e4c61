"""The numbers as they are."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.block import Precision
from kvstore.codecs.codec import Payload, byte_view, wrong_size


class Raw:
    """The tensor's own bytes: they land where they are used, and nothing is left to decode."""

    code, name, precision = 1, "raw", Precision.EXACT

    def payload_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize

    def encode(self, data: Float[Tensor, "n 2 Hk P D"]) -> Payload:
        return byte_view(data)

    def landing(
        self, memory: Payload, shape: torch.Size, dtype: torch.dtype, nbytes: int
    ) -> Payload:
        if nbytes != len(memory):
            raise wrong_size(nbytes, shape, dtype, self.name)
        return memory

    def decode(self, landed: Payload, out: Float[Tensor, "n 2 Hk P D"]) -> None:
        pass
