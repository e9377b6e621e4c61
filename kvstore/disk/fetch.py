"""Records on their way from the values file to where a reader wants them: copied, then verified."""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from kvstore import record
from kvstore.block import BlockKey
from kvstore.codecs.codec import Codec, Payload, landing_place
from kvstore.disk.entry import Entry
from kvstore.disk.values import Values
from kvstore.disk.ways import Ways
from kvstore.errors import CorruptRecord
from kvstore.layout import covering
from native.library import library

SOURCE = Path(__file__).with_suffix(".c")
SMALLEST = 241  # bytes of a payload: the compiled hash is that of longer ones
_JOB = struct.Struct("=qQQQ16sqq")  # as in the source


class Part:
    """One record of a block, copied and verified whole, of which a read wants all or some."""

    __slots__ = ("_digest", "_entry", "_error", "_landed", "_skipped", "_start", "_wanted",
                 "_whole", "group", "number", "page")  # fmt: skip

    def __init__(
        self, entry: Entry, number: int, group: range, row: Payload, at: int, nbytes: int, page: int
    ) -> None:
        """Its KV, of `nbytes`, belongs to `row` at `at`, and may reach over both ends.

        Args:
            page: where it lies.
        Raises:
            CorruptRecord: a record of such a size cannot be this one.
        """
        self._entry, self.number, self.group, self.page = entry, number, group, page
        self._wanted, self._skipped = row[max(at, 0) : at + nbytes], max(-at, 0)
        fits = self._wanted.nbytes == nbytes
        self._whole = self._wanted if fits else landing_place(nbytes)
        shape = torch.Size((len(group), *entry.shape[1:]))
        self._landed = entry.codec.landing(self._whole, shape, entry.dtype, entry.sizes[number])
        self._start, self._digest = bytearray(record.HEADER_BYTES), b""
        self._error: OSError | None = None

    @property
    def nbytes(self) -> int:
        """Of the payload."""
        return self._landed.nbytes

    def job(self, file: Values, way: int) -> bytes:
        """What `copy_records` needs to know."""
        return _JOB.pack(file.place(self.page), self.nbytes, *self._addresses(), b"", 0, way)

    def done(self, digest: bytes, error: int) -> None:
        """Note what came of its job."""
        self._digest, self._error = digest, OSError(error, os.strerror(error)) if error else None

    def copy(self, file: Values) -> None:
        """Copy what lies in its pages, whatever that is."""
        self._error, self._digest = None, b""
        try:
            if file.fill(self.page, self._start, self._landed):
                self._digest = xxhash.xxh3_128_digest(self._landed.data)
        except OSError as error:
            self._error = error

    def _about(self) -> tuple[BlockKey, range, torch.Size, torch.dtype, Codec, int, bytes]:
        """What its header must say."""
        entry = self._entry
        return (
            entry.key, self.group, entry.shape, entry.dtype, entry.codec, self.nbytes, self._digest,
        )  # fmt: skip

    def _addresses(self) -> tuple[int, int]:
        return _address(np.frombuffer(self._start, np.uint8)), _address(self._landed)

    def is_right(self) -> bool:
        """Whether the copy is the record."""
        return self._error is None and self._start == record.header(*self._about())

    def check(self) -> None:
        """Raise CorruptRecord, with the reason, unless the copy is the record."""
        if self._error is not None:
            raise CorruptRecord(f"cannot read layer group {self.number}: {self._error}")
        record.check(bytes(self._start), record.expected(*self._about()))

    def decode(self) -> None:
        """Turn the copy, which is right, into KV. CorruptRecord: it cannot be."""
        flat = torch.from_numpy(self._whole).view(self._entry.dtype)
        out = flat.view(len(self.group), *self._entry.shape[1:])
        self._entry.codec.decode(self._landed, out)

    def deliver(self) -> None:
        """Give the row what it wanted of a record that is larger."""
        if self._whole is not self._wanted:
            end = self._skipped + self._wanted.nbytes
            self._wanted[:] = self._whole[self._skipped : end]


class Read(NamedTuple):
    """Layers of one block on their way into a row, which is undefined until all is delivered."""

    entry: Entry
    parts: list[Part]


def copy(parts: Sequence[Part], file: Values, ways: Ways) -> None:
    """Copy what lies in the pages of all parts, whatever that is.

    Compiled, in one call without Python's lock, for which threads would wait; else one by one, as
    those are that are too small for it.
    """
    compiled = library(SOURCE)
    large = [part for part in parts if part.nbytes >= SMALLEST] if compiled is not None else []
    for part in parts:
        if compiled is None or part.nbytes < SMALLEST:
            part.copy(file)
    if compiled is None or not large:
        return
    jobs = bytearray(b"".join(part.job(file, ways.way(part.page)) for part in large))
    compiled.copy_records(
        ways.source(record.HEADER_BYTES, max(part.nbytes for part in large)),
        ctypes.c_void_p(_address(np.frombuffer(jobs, np.uint8))),
        ctypes.c_uint64(len(large)),
    )
    for part, (*_, digest, error, way) in zip(large, _JOB.iter_unpack(jobs), strict=True):
        part.done(digest, error)
        ways.took(part.page, way)


def planned(entry: Entry, layers: range, row: Payload) -> Read:
    """The records that hold some of `layers`; `row` has the bytes of just these layers."""
    layer_bytes, pages = row.nbytes // len(layers), entry.pages
    parts = []
    for number, group in covering(entry.shape[0], entry.group_layers, layers):
        at, nbytes = (group.start - layers.start) * layer_bytes, len(group) * layer_bytes
        parts.append(Part(entry, number, group, row, at, nbytes, pages[number]))
    return Read(entry, parts)


def _address(data: Payload) -> int:
    return int(data.__array_interface__["data"][0])
