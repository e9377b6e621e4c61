"""What the disk tier knows of a block without opening its records."""

import struct
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter

import torch
import xxhash

from kvstore.block import BlockKey, Kind, Precision
from kvstore.codecs.codec import DTYPE_CODES, DTYPE_OF_CODE, Codec
from kvstore.codecs.known import CODECS
from kvstore.disk.space import Extent
from kvstore.disk.values import pages_of
from kvstore.errors import CorruptRecord
from kvstore.layout import runs
from kvstore.tally import Group

_KEY = struct.Struct("<B32s32s16sIBI8sB")  # the fields of a BlockKey, less the digest
_REST = struct.Struct("<BHIIIHBQQIQ")
_SIZE = struct.Struct("<Q")
_CHECK = struct.Struct("<Q")
_FIELDS = ("parent", "identity", "token_digest", "num_tokens", "kind", "depth", "tenant",
           "precision")  # fmt: skip
_described = attrgetter(*_FIELDS)
_KINDS, _PRECISIONS = set(Kind), set(Precision)
_FIXED = _KEY.size + _REST.size  # then the size of each record, and the checksum of all that


@dataclass(frozen=True, slots=True)
class Entry:
    """One block: its key, its shape, what it costs, and its place in the chain and in time."""

    key: BlockKey
    dtype: torch.dtype
    shape: torch.Size  # L 2 Hk P D
    group_layers: int  # layers per record
    codec: Codec  # of all its records
    nbytes: int  # what it takes of the budget
    stamp: int  # of its last use; grows
    children: int  # stored blocks whose parent it is
    page: int  # of the values file, where its first record lies; the others follow
    sizes: tuple[int, ...]  # bytes of their payloads

    @property
    def groups(self) -> list[range]:
        return runs(self.shape[0], self.group_layers)

    @property
    def extent(self) -> Extent:
        """The pages of all its records."""
        return Extent(self.page, sum(map(pages_of, self.sizes)))

    @property
    def pages(self) -> list[int]:
        """The first page of each record."""
        return list(accumulate(map(pages_of, self.sizes[:-1]), initial=self.page))

    @property
    def group(self) -> Group:
        """With which blocks it is counted."""
        return Group(self.key.tenant, self.key.kind, self.codec.code)

    def pack(self) -> bytes:
        key, (layers, _, heads, tokens, dim) = self.key, self.shape
        packed = _pack_key(key) + _REST.pack(
            DTYPE_CODES[self.dtype], layers, heads, tokens, dim, self.group_layers, self.codec.code,
            self.nbytes, self.stamp, self.children, self.page,
        )  # fmt: skip
        packed += b"".join(map(_SIZE.pack, self.sizes))
        return packed + _CHECK.pack(_checksum(key.digest, packed))


def unpack(digest: bytes, data: memoryview | bytes) -> Entry:
    """The entry stored under `digest`.

    Raises:
        CorruptRecord: if it was not written for this digest, or was damaged.
    """
    packed = _checked(digest, data)
    if packed is None:
        raise CorruptRecord(f"checksum of a block entry of {len(data)} bytes does not match")
    has_parent, parent, *rest = _KEY.unpack_from(packed)
    identity, token_digest, num_tokens, kind, depth, tenant, precision = rest
    dtype, layers, heads, tokens, dim, group_layers, codec, nbytes, stamp, children, page = (
        _REST.unpack_from(packed, _KEY.size)
    )
    sizes = tuple(size for (size,) in _SIZE.iter_unpack(packed[_FIXED:]))
    if codec not in CODECS:
        raise CorruptRecord(f"unknown codec {codec}")
    if kind not in _KINDS or precision not in _PRECISIONS or dtype not in DTYPE_OF_CODE:
        raise CorruptRecord(f"unknown {kind=}, {precision=} or {dtype=}")
    if group_layers < 1:
        raise CorruptRecord("block entry of records without layers")
    above = parent if has_parent else None
    key = BlockKey(
        digest, above, identity, token_digest, num_tokens, Kind(kind), depth, tenant,
        Precision(precision),
    )  # fmt: skip
    shape = torch.Size((layers, 2, heads, tokens, dim))
    entry = Entry(
        key, DTYPE_OF_CODE[dtype], shape, group_layers, CODECS[codec], nbytes, stamp, children,
        page, sizes,
    )  # fmt: skip
    if not key.precision.takes(entry.codec.precision):
        raise CorruptRecord(f"{entry.codec.name} KV in a block that is {key.precision.name}")
    if len(sizes) != (records := -(-layers // group_layers)):
        raise CorruptRecord(f"block entry with {len(sizes)} sizes for {records} records")
    return entry


def matches(data: memoryview | bytes, key: BlockKey) -> bool:
    """Whether stored bytes are a whole entry of exactly this block: fast, and gives no reason."""
    packed = _checked(key.digest, data)
    return packed is not None and packed.startswith(_pack_key(key))


def check_is_for(entry: Entry, key: BlockKey) -> None:
    """Raise CorruptRecord unless the entry describes the very block that `key` names."""
    if _described(entry.key) == _described(key):
        return
    for name, stored, asked in zip(_FIELDS, _described(entry.key), _described(key), strict=True):
        if stored != asked:
            raise CorruptRecord(f"{name} is {stored!r}, not {asked!r}")


def _pack_key(key: BlockKey) -> bytes:
    return _KEY.pack(
        key.parent is not None, key.parent or b"", key.identity, key.token_digest, key.num_tokens,
        key.kind, key.depth, key.tenant, key.precision,
    )  # fmt: skip


def _checked(digest: bytes, data: memoryview | bytes) -> bytes | None:
    """The bytes of an entry before its checksum; None if they are not what was written."""
    end = len(data) - _CHECK.size
    if end < _FIXED or (end - _FIXED) % _SIZE.size:
        return None
    packed = bytes(data[:end])
    return packed if _CHECK.unpack_from(data, end) == (_checksum(digest, packed),) else None


def _checksum(digest: bytes, packed: bytes) -> int:
    return xxhash.xxh3_64_intdigest(digest + packed)
