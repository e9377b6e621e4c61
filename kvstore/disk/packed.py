"""A block as it is written to disk: its payloads, and the pages that they take."""

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash
from torch import Tensor

from kvstore import record
from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.codec import DTYPE_CODES, Codec, Payload
from kvstore.codecs.known import LOSSLESS, RAW, codec_for
from kvstore.disk.entry import Entry
from kvstore.disk.values import PAGE_BYTES, Values, pages_of
from kvstore.layout import layer_groups


def entry_cost(data: Tensor, codec: Codec = RAW) -> int:
    """What a block takes of the budget, at most, if it is written by a lossless codec."""
    parts = [data[g.start : g.stop].shape for g in groups_of(data)]
    return cost_of([codec.payload_bytes(shape, data.dtype) for shape in parts])


def cost_of(payloads: Iterable[int]) -> int:
    """What payloads of these sizes take: whole pages, and the block's share of the tables."""
    return 512 + sum(map(pages_of, payloads)) * PAGE_BYTES


def groups_of(data: Tensor) -> list[range]:
    """The layers that one record holds, for each."""
    return layer_groups(len(data), data.nbytes // len(data))


@dataclass(frozen=True, slots=True)
class Packed:
    """A block as it will be written."""

    key: BlockKey
    data: Tensor
    codec: Codec
    payloads: list[Payload]

    @property
    def cost(self) -> int:
        return cost_of(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(payload.nbytes for payload in self.payloads)

    def entry(self, page: int, stamp: int) -> Entry:
        """What is known of it once it lies in `page` and those behind."""
        data = self.data
        layers = len(groups_of(data)[0])
        return Entry(
            self.key, data.dtype, data.shape, layers, self.codec, self.cost, stamp, 0, page,
            self.sizes,
        )  # fmt: skip


def packed(key: BlockKey, block: KVBlock, exact: Codec) -> Packed:
    """Encode a block: by `exact` if its key is, else as that says, or losslessly if it must be.

    Raises:
        ValueError: the block is not of this key.
    """
    data = block.data
    if data.dtype not in DTYPE_CODES or data.shape[3] != key.num_tokens:
        raise ValueError(f"no block of {key.num_tokens} tokens: {data.dtype} {data.shape}")
    codec = codec_for(key, exact, data.shape, data.dtype)
    payloads = _encoded(data, codec)
    if payloads is None:
        codec, payloads = LOSSLESS, _encoded(data, LOSSLESS)
    assert payloads is not None, "lossless codecs take all numbers"
    return Packed(key, data, codec, payloads)


def _encoded(data: Tensor, codec: Codec) -> list[Payload] | None:
    payloads = []
    for group in groups_of(data):
        payload = codec.encode(data[group.start : group.stop])
        if payload is None:
            return None
        payloads.append(payload)
    return payloads


def write(values: Values, block: Packed, entry: Entry) -> None:
    """Write the records of a block to the pages of its entry."""
    for layers, page, payload in zip(entry.groups, entry.pages, block.payloads, strict=True):
        digest = xxhash.xxh3_128_digest(payload.data)
        start = record.header(
            entry.key, layers, entry.shape, entry.dtype, entry.codec, payload.nbytes, digest
        )
        values.write(page, start, payload)
