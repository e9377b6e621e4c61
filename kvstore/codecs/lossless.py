"""The same numbers in fewer bytes: their exponents are much alike, and zstd sees it."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import zstandard
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from kvstore.block import Precision
from kvstore.codecs.codec import Payload, byte_view, landing_place, wrong_size
from kvstore.errors import CorruptRecord

# Of KV, 1 compresses as well as any level up to 6, and faster: no text, so few matches to find.
LEVEL = 1
_SIZE = np.dtype("<u8")
_WORDS: Mapping[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Lossless:
    """Planes of bytes, each through zstd where that helps: about two thirds of bf16 or fp16.

    A number's bits are rotated by one first, so that its sign is with the mantissa, which is
    noise, and the whole exponent of bf16 or fp32 is one byte, of which 2.6 bits are
    information (ZipNN, Hershcovitch et al. 2024).

        [ bytes in plane 0 | 1 | ... | plane 0, lowest bytes | plane 1 | ... ]   sizes: u64
    """

    code, name, precision = 2, "lossless", Precision.EXACT

    def payload_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """At most: a plane that does not compress is stored as it is."""
        return dtype.itemsize * (_SIZE.itemsize + shape.numel())

    def encode(self, data: Float[Tensor, "n 2 Hk P D"]) -> Payload:
        planes = [_packed(plane) for plane in _planes(data)]
        sizes = np.array([len(plane) for plane in planes], _SIZE).view(np.uint8)
        return np.concatenate([sizes, *planes])

    def landing(
        self, memory: Payload, shape: torch.Size, dtype: torch.dtype, nbytes: int
    ) -> Payload:
        if not dtype.itemsize * _SIZE.itemsize <= nbytes <= self.payload_bytes(shape, dtype):
            raise wrong_size(nbytes, shape, dtype, self.name)
        return landing_place(nbytes)

    def decode(self, landed: Payload, out: Float[Tensor, "n 2 Hk P D"]) -> None:
        parts = _parts(landed, out.itemsize)
        words = byte_view(out).view(_WORDS[out.itemsize])
        _join([_unpacked(part, out.numel()) for part in parts], words)


def _planes(data: Tensor) -> Iterator[UInt8[np.ndarray, " N"]]:
    """Of all numbers the lowest bytes, then the next ones, and so on."""
    words = byte_view(data).view(_WORDS[data.itemsize])
    turned = words << 1 | words >> (8 * data.itemsize - 1)
    for number in range(data.itemsize):
        yield np.ascontiguousarray(turned.view(np.uint8)[number :: data.itemsize])


def _join(planes: list[UInt8[np.ndarray, " N"]], out: Shaped[np.ndarray, " N"]) -> None:
    """The numbers that have these bytes."""
    for number, plane in enumerate(planes):
        out.view(np.uint8)[number :: out.itemsize] = plane
    low = out << (8 * out.itemsize - 1)
    np.right_shift(out, 1, out=out)
    np.bitwise_or(out, low, out=out)


def _packed(plane: UInt8[np.ndarray, " N"]) -> UInt8[np.ndarray, " M"]:
    """A plane through zstd, or itself where it is no larger."""
    small = zstandard.ZstdCompressor(level=LEVEL).compress(plane.data)
    return plane if len(small) >= len(plane) else np.frombuffer(small, np.uint8)


def _parts(landed: Payload, count: int) -> list[Payload]:
    """The stored planes. CorruptRecord: the sizes in front are not theirs."""
    head = count * _SIZE.itemsize
    sizes = [int(size) for size in landed[:head].view(_SIZE)]
    if head + sum(sizes) != len(landed):
        raise CorruptRecord(f"planes of {sizes} bytes in a payload of {len(landed)}")
    starts = accumulate(sizes, initial=head)
    return [landed[at : at + size] for at, size in zip(starts, sizes, strict=False)]


def _unpacked(part: Payload, count: int) -> UInt8[np.ndarray, " N"]:
    """The plane of `count` bytes. CorruptRecord: this is none."""
    if len(part) == count:
        return part
    try:
        if zstandard.frame_content_size(part.data) != count:  # so much memory is taken, unasked
            raise CorruptRecord(f"a plane is not of {count} bytes")
        whole = zstandard.ZstdDecompressor().decompress(part.data)
    except zstandard.ZstdError as error:
        raise CorruptRecord(f"a plane cannot be decompressed: {error}") from error
    return np.frombuffer(whole, np.uint8)
