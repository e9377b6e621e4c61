"""Which pages of the values file are free: noted beside the books, so that both change together."""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import lmdb
import xxhash

if TYPE_CHECKING:
    from lmdb import _Database

_NAME = b"free pages"
_NUMBER, _EXTENT = struct.Struct("<Q"), struct.Struct("<QQ")


class Extent(NamedTuple):
    """Pages in a row."""

    start: int
    pages: int

    @property
    def end(self) -> int:
        return self.start + self.pages


class Space:
    """Hands out pages of the values file, and takes them back, in write transactions of the caller.

    What comes back is free from the next transaction on: as long as one is not committed, a crash
    brings the blocks back whose pages it freed. A damaged note is made anew from the entries.
    """

    def __init__(self, info: "_Database") -> None:
        self._info = info
        self.forget()

    def forget(self) -> None:
        """To be called when a transaction ends, however it does."""
        self._free: list[Extent] | None = None  # not yet read
        self._end = 0  # of what was ever handed out
        self._back: list[Extent] = []
        self._doubtful = False

    def take(self, txn: lmdb.Transaction, pages: int, behind: Callable[[], int]) -> int:
        """The first of so many pages in a row: in the smallest free extent that has them.

        Args:
            behind: tells a page behind which all is free; asked only where the note is damaged.
        """
        if self._free is None:
            self._read(txn, behind)
        assert self._free is not None
        fits = [extent for extent in self._free if extent.pages >= pages]
        if fits:
            found = min(fits, key=lambda extent: (extent.pages, extent.start))
        else:  # the file grows
            last = self._free[-1:]
            found = last[0] if last and last[0].end == self._end else Extent(self._end, 0)
            self._end = found.start + pages
        self._free = [extent for extent in self._free if extent.start != found.start]
        if found.pages > pages:
            self._free = sorted([*self._free, Extent(found.start + pages, found.pages - pages)])
        return found.start

    def free(self, txn: lmdb.Transaction) -> list[Extent]:
        """What was free before the transaction, the smallest first; none if that is not known."""
        found = _unpacked(txn.get(_NAME, b"", db=self._info))
        known = [] if found is None else found[0]
        return sorted(known, key=lambda extent: (extent.pages, extent.start))

    def unused(self, txn: lmdb.Transaction, pages: int) -> list[Extent]:
        """Of a file of so many pages, all that no entry names; none if that is not known."""
        found = _unpacked(txn.get(_NAME, b"", db=self._info))
        if found is None:
            return []
        free, end = found
        return [*free, Extent(end, pages - end)] if pages > end else free

    def give(self, extent: Extent) -> None:
        """Take pages back when the transaction ends."""
        self._back.append(extent)

    def doubt(self) -> None:
        """Make the note anew from the entries when the transaction ends."""
        self._doubtful = True

    def settle(self, txn: lmdb.Transaction, used: Iterable[Extent]) -> None:
        """To be called before the commit. `used`: of all entries, looked at only in doubt."""
        if self._free is None and (self._back or self._doubtful):
            self._read(txn, _nowhere)
        if self._doubtful:
            self._free, self._end = _between(used)
        elif self._free is not None:
            self._free = _joined([*self._free, *self._back])
        if self._free is not None:
            self._write(txn)

    def problems(self, txn: lmdb.Transaction, used: Iterable[Extent]) -> Iterator[str]:
        """What is wrong with the note, in sentences."""
        found = _unpacked(txn.get(_NAME, b"", db=self._info))
        if found is None:
            yield "the note of free pages is damaged"
            return
        free, end = found
        at = 0
        for extent in sorted([*free, *used]):
            if extent.start < at:
                yield f"page {extent.start} is taken twice, or taken and free"
            if extent.start > at:
                yield f"pages {at} to {extent.start} are neither taken nor free"
            at = max(at, extent.end)
        if at != end:
            yield f"the pages end at {at}, not at {end}"

    def _read(self, txn: lmdb.Transaction, behind: Callable[[], int]) -> None:
        found = _unpacked(txn.get(_NAME, b"", db=self._info))
        if found is None:
            self._doubtful = True
            found = [], behind()
        self._free, self._end = found

    def _write(self, txn: lmdb.Transaction) -> None:
        assert self._free is not None
        txn.put(_NAME, _packed(self._free, self._end), db=self._info)


def empty() -> tuple[bytes, bytes]:
    """The note of a file without pages: its name in the table, and its bytes."""
    return _NAME, _packed([], 0)


def _packed(free: Iterable[Extent], end: int) -> bytes:
    packed = _NUMBER.pack(end) + b"".join(_EXTENT.pack(*extent) for extent in free)
    return packed + _check(packed)


def _nowhere() -> int:
    return 0  # of a note that is made anew before anything is taken


def _check(packed: bytes) -> bytes:
    return _NUMBER.pack(xxhash.xxh3_64_intdigest(packed))


def _unpacked(note: memoryview | bytes) -> tuple[list[Extent], int] | None:
    """Free extents by their start, and the end; None if the note is damaged."""
    packed, check = bytes(note[: -_NUMBER.size]), bytes(note[-_NUMBER.size :])
    if len(packed) % _EXTENT.size != _NUMBER.size or check != _check(packed):
        return None
    free = [Extent(*row) for row in _EXTENT.iter_unpack(packed[_NUMBER.size :])]
    return free, _NUMBER.unpack_from(packed)[0]


def _between(used: Iterable[Extent]) -> tuple[list[Extent], int]:
    """The pages that nobody uses, and where they end."""
    at, free = 0, []
    for extent in sorted(used):
        if extent.start > at:
            free.append(Extent(at, extent.start - at))
        at = max(at, extent.end)
    return free, at


def _joined(free: Iterable[Extent]) -> list[Extent]:
    """The same pages, neighbours as one."""
    joined: list[Extent] = []
    for extent in sorted(free):
        if joined and joined[-1].end == extent.start:
            joined[-1] = Extent(joined[-1].start, joined[-1].pages + extent.pages)
        else:
            joined.append(extent)
    return joined
