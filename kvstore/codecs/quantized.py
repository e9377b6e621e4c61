"""Codecs that keep the size of numbers and some of their digits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.block import Precision
from kvstore.codecs.codec import Payload, landing_place, wrong_size
from kvstore.codecs.parts import Part

NUMBERS = 1 << 17  # of K or V at once: what is wide meanwhile stays in the CPU's caches


@dataclass(frozen=True, slots=True)
class Quantized:
    """Layer by layer K and V, each in its way; every payload of a shape has one size.

    Numbers that are infinite, or none, cannot be encoded.
    """

    code: int
    precision: Precision
    k: Part
    v: Part

    @property
    def name(self) -> str:
        return self.precision.name.lower()

    def payload_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape[0] * sum(self._sizes(shape))

    def encode(self, data: Float[Tensor, "n 2 Hk P D"]) -> Payload | None:
        rows = []
        for layers in data.split(_at_once(data.shape)):
            k, v = self.k.encode(layers[:, 0]), self.v.encode(layers[:, 1])
            if k is None or v is None:
                return None
            rows.append(torch.cat([k, v], -1).flatten())
        return torch.cat(rows).numpy()

    def landing(
        self, memory: Payload, shape: torch.Size, dtype: torch.dtype, nbytes: int
    ) -> Payload:
        if nbytes != self.payload_bytes(shape, dtype):
            raise wrong_size(nbytes, shape, dtype, self.name)
        return landing_place(nbytes)

    def decode(self, landed: Payload, out: Float[Tensor, "n 2 Hk P D"]) -> None:
        k_bytes, v_bytes = self._sizes(out.shape)
        rows = torch.from_numpy(landed).view(len(out), k_bytes + v_bytes)
        count = _at_once(out.shape)
        for some, layers in zip(rows.split(count), out.split(count), strict=True):
            self.k.decode(some[:, :k_bytes], layers[:, 0])
            self.v.decode(some[:, k_bytes:], layers[:, 1])

    def _sizes(self, shape: torch.Size) -> tuple[int, int]:
        *_, heads, tokens, dim = shape
        return self.k.nbytes(heads, tokens, dim), self.v.nbytes(heads, tokens, dim)


def _at_once(shape: torch.Size) -> int:
    """How many layers are encoded or decoded together."""
    return max(1, NUMBERS // shape[2:].numel())
