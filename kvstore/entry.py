"""What the disk tier knows of a block without opening its records."""

import struct
from dataclasses import dataclass

import torch
import xxhash

from kvstore.block import BlockKey, Kind
from kvstore.codec import DTYPE_CODES, DTYPE_OF_CODE
from kvstore.errors import CorruptRecord
from kvstore.layout import runs

_KEY = struct.Struct("<B32s32s16sIBI")  # the fields of a BlockKey, less the digest
_REST = struct.Struct("<BHIIIHQQI")
_CHECK = struct.Struct("<Q")
_PACKED = _KEY.size + _REST.size
ENTRY_BYTES = _PACKED + _CHECK.size


@dataclass(frozen=True, slots=True)
class Entry:
    """One block: its key, its shape, what it costs, and its place in the chain and in time."""

    key: BlockKey
    dtype: torch.dtype
    shape: torch.Size  # L 2 Hk P D
    group_layers: int  # layers per record
    nbytes: int  # what it takes of the budget
    stamp: int  # of its last use; grows
    children: int  # stored blocks whose parent it is

    @property
    def groups(self) -> list[range]:
        return runs(self.shape[0], self.group_layers)

    def pack(self) -> bytes:
        key, (layers, _, heads, tokens, dim) = self.key, self.shape
        packed = _pack_key(key) + _REST.pack(
            DTYPE_CODES[self.dtype], layers, heads, tokens, dim, self.group_layers, self.nbytes,
            self.stamp, self.children,
        )  # fmt: skip
        return packed + _CHECK.pack(_checksum(key.digest, packed))


def unpack(digest: bytes, data: memoryview | bytes) -> Entry:
    """The entry stored under `digest`.

    Raises:
        CorruptRecord: if it was not written for this digest, or was damaged.
    """
    if len(data) != ENTRY_BYTES:
        raise CorruptRecord(f"block entry of {len(data)} bytes, not {ENTRY_BYTES}")
    packed = bytes(data[:_PACKED])
    if _CHECK.unpack_from(data, _PACKED) != (_checksum(digest, packed),):
        raise CorruptRecord("block entry checksum does not match")
    has_parent, parent, identity, token_digest, num_tokens, kind, depth = _KEY.unpack_from(packed)
    dtype, layers, heads, tokens, dim, group_layers, nbytes, stamp, children = _REST.unpack_from(
        packed, _KEY.size
    )
    above = parent if has_parent else None
    key = BlockKey(digest, above, identity, token_digest, num_tokens, Kind(kind), depth)
    shape = torch.Size((layers, 2, heads, tokens, dim))
    return Entry(key, DTYPE_OF_CODE[dtype], shape, group_layers, nbytes, stamp, children)


def matches(data: memoryview | bytes, key: BlockKey) -> bool:
    """Whether stored bytes are a whole entry of exactly this block: fast, and gives no reason."""
    packed = bytes(data[:_PACKED])
    return (
        len(data) == ENTRY_BYTES
        and packed.startswith(_pack_key(key))
        and _CHECK.unpack_from(data, _PACKED) == (_checksum(key.digest, packed),)
    )


def check_is_for(entry: Entry, key: BlockKey) -> None:
    """Raise CorruptRecord unless the entry describes the very block that `key` names."""
    for name in ("parent", "identity", "token_digest", "num_tokens", "kind", "depth"):
        stored, asked = getattr(entry.key, name), getattr(key, name)
        if stored != asked:
            raise CorruptRecord(f"{name} is {stored!r}, not {asked!r}")


def _pack_key(key: BlockKey) -> bytes:
    return _KEY.pack(
        key.parent is not None, key.parent or b"", key.identity, key.token_digest, key.num_tokens,
        key.kind, key.depth,
    )  # fmt: skip


def _checksum(digest: bytes, packed: bytes) -> int:
    return xxhash.xxh3_64_intdigest(digest + packed)
