"""The value that makes a block visible to other machines: which records it has, and their seals.

It is written after all of them. Records of two writers at a time, whose numbers may differ in
their last bits, do not fit one index, and are a miss.
"""

import struct
from typing import NamedTuple

import torch

from kvstore.block import BlockKey
from kvstore.codecs.codec import DTYPE_CODES, DTYPE_OF_CODE
from kvstore.errors import CorruptRecord
from kvstore.layout import runs
from kvstore.remote.seal import INDEX, SEAL_BYTES, Seals

_FIXED = struct.Struct("<4sHBxIIIII")
_MAGIC, _VERSION = b"HRRI", 1
_RECORD = struct.Struct(f"<I{SEAL_BYTES}s")
MAX_INDEX_BYTES = 16 << 10  # of a block in 450 records
VALUE_BYTES = 4 << 20  # of a record: what a server takes without others having to wait for long


class Index(NamedTuple):
    """A block as its records tell it."""

    dtype: torch.dtype
    shape: torch.Size  # L 2 Hk P D
    group_layers: int  # layers per record
    sizes: tuple[int, ...]  # of the records, in bytes
    seals: tuple[bytes, ...]

    @property
    def groups(self) -> list[range]:
        return runs(self.shape[0], self.group_layers)

    @property
    def nbytes(self) -> int:
        """Of the block, decoded."""
        return self.shape.numel() * self.dtype.itemsize

    def pack(self, key: BlockKey, seals: Seals) -> bytes:
        """The value, sealed for the place of just this block."""
        layers, _, heads, tokens, dim = self.shape
        packed = _FIXED.pack(
            _MAGIC, _VERSION, DTYPE_CODES[self.dtype], layers, heads, tokens, dim, self.group_layers
        )
        packed += b"".join(map(_RECORD.pack, self.sizes, self.seals))
        return packed + seals.of(key, INDEX, packed)


def unpack(value: memoryview, key: BlockKey, seals: Seals) -> Index:
    """The index of a block. Raises CorruptRecord unless somebody with our secret wrote it."""
    packed, seal = bytes(value[:-SEAL_BYTES]), bytes(value[-SEAL_BYTES:])
    if not seals.hold(seal, key, INDEX, packed):
        raise CorruptRecord("the seal of its index does not hold")
    if len(packed) < _FIXED.size or (len(packed) - _FIXED.size) % _RECORD.size:
        raise CorruptRecord(f"an index of {len(value)} bytes")
    magic, version, dtype, layers, heads, tokens, dim, group = _FIXED.unpack_from(packed)
    if (magic, version) != (_MAGIC, _VERSION) or dtype not in DTYPE_OF_CODE or group < 1:
        raise CorruptRecord(f"an index of another format: {packed[: _FIXED.size]!r}")
    records = list(_RECORD.iter_unpack(packed[_FIXED.size :]))
    sizes, their = tuple(size for size, _ in records), tuple(seal for _, seal in records)
    index = Index(
        DTYPE_OF_CODE[dtype], torch.Size((layers, 2, heads, tokens, dim)), group, sizes, their
    )
    if len(records) != len(index.groups) or max(sizes, default=0) > VALUE_BYTES:
        raise CorruptRecord(f"an index of {len(records)} records for {layers} layers")
    return index


def record_count(value: memoryview) -> int:
    """How many records an index lists that nobody has verified; at most `MAX_INDEX_BYTES` hold."""
    return max(0, len(value) - _FIXED.size - SEAL_BYTES) // _RECORD.size
