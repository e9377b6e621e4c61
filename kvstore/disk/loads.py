"""Reading blocks from disk: a verified copy, or a miss."""

from collections.abc import Sequence

import lmdb
import torch
from torch import Tensor

from kvstore import record
from kvstore.block import BlockKey
from kvstore.codecs.codec import byte_view
from kvstore.disk.access import Access
from kvstore.disk.entry import Entry, check_is_for
from kvstore.disk.fetch import Read, copy, planned
from kvstore.errors import CorruptRecord
from kvstore.tier import check_layers, checked_out
from native.pages import aligned


def load(
    access: Access, keys: Sequence[BlockKey], layers: range | None, out: Tensor | None
) -> tuple[list[bool], Tensor | None]:
    """Which blocks, all of one shape, are now in the rows of `out`, and that.

    Step by step for all: Python takes three times as long after a copy of 2 MiB, which leaves
    nothing of it in the CPU's caches.

    Args:
        layers: None for all.
        out: None for a new tensor.
    """
    env = access.env
    try:
        with access.reading() as txn:
            entries = [_find(access, txn, key) for key in keys]
            reads, out = _planned(entries, layers, out)
            parts = [part for read in reads if read for part in read.parts]
            env.values_guard.renew()
            copy(parts, env.values, env.ways)
        return [read is not None and _finish(access, read) for read in reads], out
    except CorruptRecord as error:  # no block's own: the tables
        if out is not None and len(keys) > 1:
            pairs = zip(keys, out, strict=True)
            return [load(access, [key], layers, row[None])[0][0] for key, row in pairs], out
        access.quarantine(keys[0].digest, str(error))
        return [False], out


def records(access: Access, digest: bytes) -> tuple[Entry, list[memoryview]] | None:
    """A block as it is stored, every record verified; None if it is not there.

    Raises:
        CorruptRecord: it is damaged.
    """
    entry: Entry | None = None
    while True:  # as often as it moves
        with access.reading() as txn:
            before, entry = entry, access.ledger.get(txn, digest)
        if entry is None:
            return None
        pages = zip(entry.pages, entry.sizes, strict=True)
        try:
            found = [access.env.values.record(page, size) for page, size in pages]
            for layers, value in zip(entry.groups, found, strict=True):
                record.verify(value, entry.key, layers, entry.shape, entry.dtype)
            return entry, found
        except (CorruptRecord, OSError) as error:
            if before is not None and before.page == entry.page:
                raise CorruptRecord(str(error)) from error


def _find(access: Access, txn: lmdb.Transaction, key: BlockKey) -> Entry | None:
    """The entry of a block that is served."""
    if key.digest in access.bad:
        return None
    try:
        entry = access.ledger.get(txn, key.digest)
        if entry is not None:
            check_is_for(entry, key)
        return entry
    except CorruptRecord as error:
        access.quarantine(key.digest, str(error))
        return None


def _planned(
    entries: Sequence[Entry | None], layers: range | None, out: Tensor | None
) -> tuple[list[Read | None], Tensor | None]:
    """A read of `layers`, or all, for each block that is there, and the tensor they go to."""
    for dtype, whole in dict.fromkeys((e.dtype, e.shape) for e in entries if e is not None):
        layers = range(whole[0]) if layers is None else layers
        check_layers(layers, whole[0])
        shape = torch.Size((len(entries), len(layers), *whole[1:]))
        out = aligned(shape, dtype) if out is None else out
        checked_out(out, shape, dtype)
    if layers is None or out is None:
        return [None] * len(entries), out
    rows = byte_view(out).reshape(len(entries), -1)
    return [
        None if entry is None else planned(entry, layers, row)
        for entry, row in zip(entries, rows, strict=True)
    ], out


def _finish(access: Access, read: Read) -> bool:
    """Whether all of it is there, verified."""
    try:
        if not all(part.is_right() for part in read.parts) and not _is_right_again(access, read):
            return False
        for part in read.parts:
            part.decode()
            part.deliver()
        return True
    except CorruptRecord as error:
        access.quarantine(read.entry.key.digest, str(error))
        return False


def _is_right_again(access: Access, read: Read) -> bool:
    """Copy once more what was not right, without the map; False: the block is gone by now.

    Raises:
        CorruptRecord: it is there, and damaged.
    """
    with access.reading() as txn:
        now = access.ledger.get(txn, read.entry.key.digest)
        if now is None or now.page != read.entry.page:
            return False
        for part in read.parts:
            part.copy(access.env.values)
    for part in read.parts:
        part.check()
    return True
