"""How the numbers of a block become the payload of a record and back."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvstore.errors import CorruptRecord
from kvstore.identity import DTYPES

Payload = UInt8[np.ndarray, " N"]

# Numbers on disk: never reuse one.
DTYPE_CODES: Mapping[torch.dtype, int] = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
DTYPE_OF_CODE: Mapping[int, torch.dtype] = {code: dtype for dtype, code in DTYPE_CODES.items()}
assert set(DTYPE_CODES) == set(DTYPES.values())


@runtime_checkable
class Codec(Protocol):
    """A payload is copied into `landing`, verified there, and only then decoded into `out`."""

    code: int  # in the record header

    def encode(self, data: Float[Tensor, "n 2 Hk P D"]) -> Payload: ...
    def landing(self, out: Float[Tensor, "n 2 Hk P D"], nbytes: int) -> Payload: ...
    def decode(self, landed: Payload, out: Float[Tensor, "n 2 Hk P D"]) -> None: ...


class RawCodec:
    """The tensor's own bytes: they land where they are used, and nothing is left to decode."""

    code = 1

    def encode(self, data: Float[Tensor, "n 2 Hk P D"]) -> Payload:
        return byte_view(data)

    def landing(self, out: Float[Tensor, "n 2 Hk P D"], nbytes: int) -> Payload:
        if nbytes != out.nbytes:
            raise CorruptRecord(f"payload of {nbytes} bytes for a tensor of {out.nbytes}")
        return byte_view(out)

    def decode(self, landed: Payload, out: Float[Tensor, "n 2 Hk P D"]) -> None:
        pass


RAW = RawCodec()
CODECS: Mapping[int, Codec] = {codec.code: codec for codec in (RAW,)}


def byte_view(data: Tensor) -> Payload:
    """The memory of a contiguous CPU tensor, as bytes."""
    return data.view(torch.uint8).numpy().reshape(-1)
