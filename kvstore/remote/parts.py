"""Records that were asked for, and where their KV goes once they are verified."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore import record
from kvstore.block import BlockKey
from kvstore.errors import CorruptRecord
from kvstore.layout import covering
from kvstore.remote.index import Index
from kvstore.remote.seal import Seals


class Part(NamedTuple):
    """One record of a block, of which a row wants all or some layers."""

    key: BlockKey
    number: int
    group: range  # the layers it holds
    num_layers: int  # of the block
    nbytes: int
    seal: bytes
    layers: range  # the layers of the row
    row: Float[Tensor, "n 2 Hk P D"]

    def deliver(self, value: memoryview, seals: Seals) -> None:
        """Fill the row's part. Raises CorruptRecord if the value is not what the index says."""
        if len(value) != self.nbytes:
            raise CorruptRecord(f"record {self.number} has {len(value)} bytes, not {self.nbytes}")
        if not seals.hold(self.seal, self.key, self.number, value):
            raise CorruptRecord(f"the seal of record {self.number} does not hold")
        lo, hi = max(self.group.start, self.layers.start), min(self.group.stop, self.layers.stop)
        target = self.row[lo - self.layers.start : hi - self.layers.start]
        if len(target) == len(self.group):
            record.decode_into(target, value, self.key, self.group, self.num_layers)
            return
        whole = torch.empty(len(self.group), *self.row.shape[1:], dtype=self.row.dtype)
        record.decode_into(whole, value, self.key, self.group, self.num_layers)
        target.copy_(whole[lo - self.group.start : hi - self.group.start])


def parts_of(
    key: BlockKey, index: Index, layers: range, row: Float[Tensor, "n 2 Hk P D"]
) -> list[Part]:
    """The records that hold some of `layers`."""
    num_layers = index.shape[0]
    return [
        Part(key, i, group, num_layers, index.sizes[i], index.seals[i], layers, row)
        for i, group in covering(num_layers, index.group_layers, layers)
    ]


def strides(parts: Sequence[Part], most_bytes: int) -> Iterator[list[Part]]:
    """Parts to be asked for together: as many as `most_bytes` hold, and at least one."""
    stride: list[Part] = []
    size = 0
    for part in parts:
        if stride and size + part.nbytes > most_bytes:
            yield stride
            stride, size = [], 0
        stride.append(part)
        size += part.nbytes
    if stride:
        yield stride
