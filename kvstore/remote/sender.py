"""Blocks on their way to a backend: all records first, then what makes them visible."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore import record
from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.codec import Codec
from kvstore.layout import group_size, layer_groups
from kvstore.remote.backend import RemoteBackend
from kvstore.remote.guarded import Guarded
from kvstore.remote.index import MAX_INDEX_BYTES, VALUE_BYTES, Index, record_count
from kvstore.remote.seal import Seals
from kvstore.remote.wire import Buffer
from kvstore.tier import Item

SEND_BYTES = 4 << 20  # in one exchange
UNLISTED = 128  # records that are deleted of a block without an index; models have fewer layers
Value = tuple[bytes, Buffer]


@dataclass(slots=True)
class Draft:
    """A block of which records are being sent, and what its index will say of them."""

    key: BlockKey
    block: KVBlock
    sizes: list[int] = field(default_factory=list)
    seals: list[bytes] = field(default_factory=list)
    lost: bool = False  # a record was not taken

    @property
    def groups(self) -> list[range]:
        return layer_groups(len(self.block.data), self.block.data[0].nbytes)

    def record(self, group: range, codec: Codec, seals: Seals) -> Value:
        """The next record, with its name."""
        data, number = self.block.data, len(self.sizes)
        layers = data[group.start : group.stop]
        value = record.encode_as_named(self.key, layers, group, len(data), codec)
        self.sizes.append(len(value))
        self.seals.append(seals.of(self.key, number, value))
        return seals.record_name(self.key.digest, number), value

    def index(self, seals: Seals) -> Value:
        data = self.block.data
        size = group_size(len(data), data[0].nbytes)
        index = Index(data.dtype, data.shape, size, tuple(self.sizes), tuple(self.seals))
        return seals.index_name(self.key.digest), index.pack(self.key, seals)


class Sender:
    """What the background thread does; see `WriteBehind`.

    Args:
        count: told of every batch how many bytes were written, and how many blocks were not.
    """

    def __init__(
        self, guarded: Guarded, seals: Seals, codec: Codec, count: Callable[[int, int], None]
    ) -> None:
        self._guarded, self._seals, self._codec, self._count = guarded, seals, codec, count
        self.probe = guarded.probe

    def write(self, blocks: Sequence[Item]) -> None:
        """Send those that are not there, in order; what fails is skipped and counted."""
        names = [self._seals.index_name(key.digest) for key, _ in blocks]
        present = self._guarded.ask(lambda backend: backend.exists_many(names))
        if present is None:
            return self._count(0, len(blocks))
        absent = zip(blocks, present, strict=True)
        drafts = [Draft(*item) for item, is_there in absent if not is_there]
        for stride in _strides(drafts):
            self._send(stride)
        whole = [draft for draft in drafts if not draft.lost]
        taken = self._put([draft.index(self._seals) for draft in whole])
        sizes = [d.block.nbytes for d, is_there in zip(whole, taken, strict=True) if is_there]
        return self._count(sum(sizes), len(drafts) - len(sizes))

    def discard(self, digests: Sequence[bytes]) -> None:
        """Delete blocks that are not as they were written; others may then write them anew."""
        if self._guarded.ask(lambda _: self.delete(digests)) is None:
            return
        for digest in digests:
            self._guarded.trust(digest)

    def delete(self, digests: Sequence[bytes]) -> int:
        """Delete blocks, their index first; how many there were. Raises Unreachable."""
        backend, found = self._guarded.backend, 0
        for digest in digests:
            name, value = self._seals.index_name(digest), memoryview(bytearray(MAX_INDEX_BYTES))
            (size,) = backend.get_many([name], [value])
            count = record_count(value[:size]) or UNLISTED  # evicted, or never taken
            records = [self._seals.record_name(digest, number) for number in range(count)]
            backend.delete([name, *records])
            found += size > 0
        return found

    def _send(self, stride: Sequence[tuple[Draft, range]]) -> None:
        """Send some records; drafts that lost one are marked."""
        left = [(draft, group) for draft, group in stride if not draft.lost]
        taken = self._put([draft.record(group, self._codec, self._seals) for draft, group in left])
        for (draft, _), is_there in zip(left, taken, strict=True):
            draft.lost |= not is_there

    def _put(self, values: Sequence[Value]) -> list[bool]:
        """Which values are there now."""
        taken = self._guarded.ask(partial(_put, values)) if values else None
        return [False] * len(values) if taken is None else taken


def _put(values: Sequence[Value], backend: RemoteBackend) -> list[bool]:
    return backend.put_many(values)


def _strides(drafts: Sequence[Draft]) -> Iterator[list[tuple[Draft, range]]]:
    """Records that are sent together: as many as `SEND_BYTES` hold, and at least one."""
    stride: list[tuple[Draft, range]] = []
    size = 0
    for draft in drafts:
        for group in draft.groups:
            nbytes = len(group) * draft.block.data[0].nbytes
            if stride and size + nbytes > SEND_BYTES:
                yield stride
                stride, size = [], 0
            stride.append((draft, group))
            size += nbytes
    if stride:
        yield stride


def is_sendable(item: Item) -> bool:
    """Whether a block can be shared: sealed for its tenant, in values that are not too large."""
    key, block = item
    layer_bytes = block.data[0].nbytes
    value = layer_bytes * group_size(len(block.data), layer_bytes) + record.HEADER_BYTES
    return bool(key.seal_key) and value <= VALUE_BYTES
