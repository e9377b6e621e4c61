"""Blocks of a store in one file, to be taken into another.

    [ MAGIC ][ frame ][ frame ] ...        a frame is one block, parents before children:
    [ mark, digest, sizes | check ][ entry, as in the store ][ record ][ record ] ...

Entries and records carry their own checksums. Where a frame's head is damaged, reading goes on at
the next mark. A file holds KV of whoever wrote it: take in only what you trust.
"""

import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from kvstore import record
from kvstore.block import KVBlock
from kvstore.disk.entry import Entry, unpack
from kvstore.disk.environment import FORMAT
from kvstore.disk.loads import records
from kvstore.disk.tier import DiskTier
from kvstore.errors import CorruptRecord, StoreFormatError
from kvstore.tier import Item

MAGIC = b"headrace blocks 1, " + FORMAT + b"\n"
_MARK = b"\x93HRblk\r\n"
_HEAD = struct.Struct("<8s32sIH")  # mark, digest, bytes of the entry, number of records
_SIZE = struct.Struct("<Q")
_CHECK = struct.Struct("<Q")
_LOOK = 1 << 20  # bytes searched for a mark at once
_MOST_RATIO = 64  # of numbers to stored bytes: more is no block of ours


class Head(NamedTuple):
    """Where one block's parts lie in the file."""

    digest: bytes
    entry_bytes: int
    record_bytes: list[int]
    nbytes: int  # of the head itself

    @property
    def body(self) -> int:
        return self.entry_bytes + sum(self.record_bytes)


class Exported(NamedTuple):
    """What went to a file."""

    blocks: int
    nbytes: int  # of the file
    damaged: int  # blocks, which were left out
    gone: int = 0  # deleted or evicted meanwhile


def export(tier: DiskTier, path: Path, chosen: Callable[[Entry], bool]) -> Exported:
    """Write chosen blocks to a file, which is there whole or not at all, and is its owner's alone.

    What rests on a block that is damaged, or gone by then, is left out with it.
    """
    with tier.access.reading() as txn:
        entries = [entry for entry in tier.access.ledger.entries(txn) if chosen(entry)]
    entries.sort(key=lambda entry: entry.key.depth)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC)
            lost = _write_all(tier, file, entries)
            nbytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    damaged = sum(lost.values())
    return Exported(len(entries) - len(lost), nbytes, damaged, len(lost) - damaged)


def imported(file: BufferedIOBase) -> Iterator[Item | None]:
    """The blocks of a file, verified; None for each one that is damaged.

    Raises:
        StoreFormatError: it is no such file, or one of another version.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise StoreFormatError(
            "this is no file of headrace store export, or one of another version: needs "
            f"{MAGIC.decode().strip()!r} at its start"
        )
    return _frames(file)


def _frames(file: BufferedIOBase) -> Iterator[Item | None]:
    at, end = len(MAGIC), file.seek(0, os.SEEK_END)
    while at < end:
        file.seek(at)
        head = _read_head(file)
        if head is None or at + head.nbytes + head.body > end:
            yield None
            at = _next_mark(file, at + 1)
        else:
            yield _block(head, file.read(head.body))
            at += head.nbytes + head.body


def _write_all(tier: DiskTier, file: BufferedIOBase, entries: list[Entry]) -> dict[bytes, bool]:
    """The blocks that could not be written, and whether for damage."""
    lost: dict[bytes, bool] = {}
    for entry in entries:
        above = lost.get(entry.key.parent or b"")
        parts = _parts(tier, entry) if above is None else above
        if isinstance(parts, bool):
            lost[entry.key.digest] = parts
            continue
        head = _HEAD.pack(_MARK, entry.key.digest, len(parts[0]), len(parts) - 1)
        head += b"".join(_SIZE.pack(len(part)) for part in parts[1:])
        file.write(head + _CHECK.pack(xxhash.xxh3_64_intdigest(head)))
        for part in parts:
            file.write(part)
    return lost


def _parts(tier: DiskTier, entry: Entry) -> list[bytes | memoryview] | bool:
    """A block's entry and records, verified; else whether it is damaged, and not gone."""
    try:
        found = records(tier.access, entry.key.digest)
    except CorruptRecord:
        return True
    return False if found is None else [found[0].pack(), *found[1]]


def _read_head(file: BufferedIOBase) -> Head | None:
    fixed = file.read(_HEAD.size)
    if len(fixed) < _HEAD.size or not fixed.startswith(_MARK):
        return None
    _, digest, entry_bytes, count = _HEAD.unpack(fixed)
    sizes = file.read(count * _SIZE.size)
    check = file.read(_CHECK.size)
    if check != _CHECK.pack(xxhash.xxh3_64_intdigest(fixed + sizes)):
        return None
    nbytes = len(fixed) + len(sizes) + len(check)
    return Head(digest, entry_bytes, [n for (n,) in _SIZE.iter_unpack(sizes)], nbytes)


def _next_mark(file: BufferedIOBase, at: int) -> int:
    """Where the next frame may begin; the end of the file if nowhere."""
    while True:
        file.seek(at)
        part = file.read(_LOOK)
        found = part.find(_MARK)
        if found >= 0:
            return at + found
        if len(part) < _LOOK:
            return at + len(part)
        at += _LOOK - len(_MARK) + 1


def _block(head: Head, body: bytes) -> Item | None:
    """The block of a frame; None if anything about it is not right."""
    view = memoryview(body)
    try:
        entry = unpack(head.digest, bytes(view[: head.entry_bytes]))
        if len(entry.groups) != len(head.record_bytes) or entry.shape[3] != entry.key.num_tokens:
            return None
        if not 0 < math.prod(entry.shape) * entry.dtype.itemsize <= _MOST_RATIO * len(body):
            return None
        data = torch.empty(entry.shape, dtype=entry.dtype)
        at = head.entry_bytes
        for layers, size in zip(entry.groups, head.record_bytes, strict=True):
            out = data[layers.start : layers.stop]
            record.decode_into(out, view[at : at + size], entry.key, layers, entry.shape[0])
            at += size
    except CorruptRecord:
        return None
    return entry.key, KVBlock(data)
