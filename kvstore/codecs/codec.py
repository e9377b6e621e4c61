"""What a codec is: the numbers of some layers of a block become a payload, and back."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvstore.block import Precision
from kvstore.errors import CorruptRecord
from kvstore.identity import DTYPES
from native.pages import aligned

Payload = UInt8[np.ndarray, " _"]

# Numbers on disk: never reuse one.
DTYPE_CODES: Mapping[torch.dtype, int] = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
DTYPE_OF_CODE: Mapping[int, torch.dtype] = {code: dtype for dtype, code in DTYPE_CODES.items()}
assert set(DTYPE_CODES) == set(DTYPES.values())


@runtime_checkable
class Codec(Protocol):
    """A payload is copied into `landing`, verified there, and only then decoded into `out`.

    payload_bytes: what KV of this shape takes, or at most takes where the numbers matter.
    encode: may be a view of `data`. None: these numbers cannot be encoded, except losslessly.
    landing: memory for a payload of `nbytes`, which may be `memory` itself, where KV of this shape
        shall be in the end. Raises CorruptRecord for a size that its payload cannot have.
    decode: of what was verified; leaves `out` undefined where it raises CorruptRecord.
    precision: what it does to the numbers.
    """

    @property
    def code(self) -> int: ...  # in the headers of records
    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    def payload_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int: ...
    def encode(self, data: Float[Tensor, "n 2 Hk P D"]) -> Payload | None: ...
    def landing(
        self, memory: Payload, shape: torch.Size, dtype: torch.dtype, nbytes: int
    ) -> Payload: ...
    def decode(self, landed: Payload, out: Float[Tensor, "n 2 Hk P D"]) -> None: ...


def byte_view(data: Tensor) -> Payload:
    """The memory of a contiguous CPU tensor, as bytes."""
    return data.view(torch.uint8).numpy().reshape(-1)


def landing_place(nbytes: int) -> Payload:
    """Memory for one, that a disk can write to by itself."""
    return aligned((nbytes,), torch.uint8).numpy()


def wrong_size(nbytes: int, shape: torch.Size, dtype: torch.dtype, name: str) -> CorruptRecord:
    """The error of a payload whose size cannot be right."""
    return CorruptRecord(f"{name} payload of {nbytes} bytes for {dtype} {list(shape)}")
