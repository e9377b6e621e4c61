"""Blocks on disk: their KV in a file of values, what is known of them in LMDB."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import torch
from jaxtyping import Float
from torch import Tensor

from kvstore import record
from kvstore.block import BlockKey, KVBlock, Precision
from kvstore.codecs.codec import Codec, byte_view
from kvstore.codecs.known import LOSSLESS, RAW
from kvstore.disk.entry import Entry, check_is_for, matches
from kvstore.disk.environment import explained, open_environment
from kvstore.disk.fetch import SOURCE, Read, copy, planned
from kvstore.disk.ledger import Ledger, Packed, entry_cost, packed, write
from kvstore.disk.readers import Readers
from kvstore.disk.writer import BATCH_BYTES
from kvstore.errors import CorruptRecord, StoreError, TierFull
from kvstore.quotas import Limits
from kvstore.tally import Groups
from kvstore.tier import Item, Resident, check_layers, checked_out
from native.heap import keep_freed
from native.library import library
from native.pages import aligned

WRITE_THREADS = 4
READ_BYTES = 8 << 20  # at once of several blocks: how long a transaction keeps LMDB's pages
_log = logging.getLogger(__name__)


class DiskTier:
    """Blocks in a folder, which several processes may share.

    Within one write transaction of LMDB, free pages are taken, the KV of all blocks is written
    there by several threads and flushed, and their entries are committed: a block is there whole
    or not at all. The budget counts live pages, of what the codec made; freed ones are used again
    from the next commit on, so the file grows to the budget and about two batches more.

    Reads verify a copy, made in the ways of `kvstore.disk.ways`. Where that is not what the entry
    says, the block may have gone meanwhile, and its pages to another: then it is a miss, else
    damaged. A sector that cannot be read, or a file cut short, is a miss as well.
    """

    name = "disk"
    setting = "disk_bytes"
    durable = True

    def __init__(self, path: Path, capacity_bytes: int, codec: Codec = RAW) -> None:
        self.capacity_bytes = capacity_bytes
        if codec.precision is not Precision.EXACT:
            raise ValueError(f"exact blocks are written by raw or lossless, not {codec.name}")
        self._codec = codec  # of exact blocks; the keys of others say theirs
        self.corrupt = 0
        library(SOURCE)  # compiled now: not while a transaction waits
        keep_freed(2 * BATCH_BYTES)  # codecs allocate what they make
        self._env = open_environment(path)
        self.ledger = Ledger(self._env)
        self.readers = Readers(self._env.lmdb)
        self._bad: dict[bytes, str] = {}  # quarantine: digest -> reason
        self._stamps: dict[bytes, None] = {}  # uses not yet written, least recent first
        self._writer = threading.Lock()
        self._threads = ThreadPoolExecutor(WRITE_THREADS, "headrace-disk")
        self._trouble = ""  # of all blocks, when last one was looked for

    @property
    def quarantined(self) -> int:
        return len(self._bad)

    @property
    def used_bytes(self) -> int:
        with self.reading() as txn:
            return self.ledger.used(txn)

    def cost(self, key: BlockKey, block: KVBlock) -> int:
        exact = key.precision is Precision.EXACT
        return entry_cost(block.data, self._codec if exact else LOSSLESS)

    def sizes(self, digests: Sequence[bytes]) -> list[int]:
        with self.reading() as txn:
            entries = [self.ledger.sound(txn, digest) for digest in digests]
        return [0 if entry is None else entry.nbytes for entry in entries]

    def put(
        self, blocks: Sequence[Item], victims: Iterable[bytes] = (), limits: Limits | None = None
    ) -> list[bytes]:
        """As Tier.put. Raises MissingParent for a block that no lookup could reach."""
        try:
            return self._put(blocks, victims, limits or {})
        except TierFull:
            if self.ledger.passed_over:  # who asks again finds room
                self._mend()
            raise

    def _put(self, blocks: Sequence[Item], victims: Iterable[bytes], limits: Limits) -> list[bytes]:
        there = self.held([key for key, _ in blocks])  # damaged ones are not, and replaced
        new = {key.digest: (key, b) for (key, b), is_ in zip(blocks, there, strict=True) if not is_}
        made = list(self._threads.map(self._packed, new.values()))
        with self.changing() as txn:
            fresh = [block for block in made if self.ledger.get(txn, block.key.digest) is None]
            lack = self.ledger.lack(txn, fresh, self.capacity_bytes, limits)
            gone = self.ledger.make_room(txn, lack, victims, self)
            self.ledger.shrink(txn, self.capacity_bytes)
            placed = [(block, self.ledger.place(txn, block)) for block in fresh]
            self._write(placed)
            for _, entry in placed:
                self.ledger.add(txn, entry)
        self.readers.check()
        return gone

    def get(self, key: BlockKey) -> KVBlock | None:
        data = self._one(key, None, None)
        return None if data is None else KVBlock(data)

    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None:
        return self._one(key, layers, out)

    def read_many(
        self, keys: Sequence[BlockKey], layers: range, out: Float[Tensor, "B n 2 Hk P D"]
    ) -> list[bool]:
        at_once = max(1, READ_BYTES // (out.nbytes // max(1, len(out)) or 1))
        found: list[bool] = []
        for first in range(0, len(keys), at_once):
            part = slice(first, first + at_once)
            found += self._load(keys[part], layers, out[part])[0]
        return found

    def delete(self, keys: Sequence[BlockKey | bytes]) -> None:
        with self.changing() as txn:
            self.ledger.remove_trees(txn, [k if isinstance(k, bytes) else k.digest for k in keys])
        self._give_back()

    def held(self, keys: Sequence[BlockKey]) -> list[bool]:
        try:
            with self.reading() as txn:
                there: dict[bytes, bool] = {}
                for key in keys:  # what rests on a damaged block goes with it
                    there[key.digest] = there.get(key.parent or b"", True) and self._has(txn, key)
                return [there[key.digest] for key in keys]
        except CorruptRecord as error:
            if str(error) != self._trouble:
                _log.warning("all blocks on disk are misses: %s", error)
            self._trouble = str(error)
            return [False] * len(keys)

    def touched(self, digests: Sequence[bytes]) -> None:
        """Remembered here, written with the next change or on closing."""
        for digest in digests:
            self._stamps.pop(digest, None)
            self._stamps[digest] = None

    def residents(self) -> Iterator[Resident]:
        with self.reading() as txn:
            found = list(self.ledger.entries(txn))
        recent = {digest: i for i, digest in enumerate(list(self._stamps), 1)}
        found.sort(key=lambda e: (recent.get(e.key.digest, 0), e.stamp, -e.key.depth))
        for entry in found:
            key = entry.key
            yield Resident(key.digest, key.parent, entry.nbytes, key.depth, key.tenant)

    def groups(self) -> Groups:
        with self.reading() as txn:
            return self.ledger.groups(txn)

    def clear(self) -> None:
        with self.changing() as txn:
            self.ledger.clear(txn)
        self._give_back()

    def close(self) -> None:
        self._threads.shutdown()
        try:
            if (self._stamps or self._bad) and self._env.is_writable():
                with suppress(StoreError), self.changing():  # else uses and damage are forgotten
                    pass
        finally:
            self._env.close()

    def __contains__(self, key: BlockKey | bytes | None) -> bool:
        if isinstance(key, BlockKey):
            return self.held([key])[0]
        try:
            with self.reading() as txn:
                return key is not None and self.ledger.get(txn, key) is not None
        except CorruptRecord:
            return False

    def _give_back(self) -> None:
        """Free pages become holes: what was deleted can be read from the file no more.

        Nobody takes one meanwhile; whoever is reading one finds that it is not what it was.
        """
        with self.changing() as txn:
            for extent in self.ledger.space.unused(txn, self._env.values.pages):
                self._env.values.punch(*extent)

    def _packed(self, item: Item) -> Packed:
        return packed(*item, self._codec)

    def _write(self, placed: Sequence[tuple[Packed, Entry]]) -> None:
        """Write the KV of blocks to their pages, and flush it."""
        values = self._env.values
        writing = [self._threads.submit(write, values, *block) for block in placed]
        wait(writing)  # for all: after an error nobody may still write to pages that others take
        for written in writing:
            written.result()
        if writing:
            values.sync()

    def _one(self, key: BlockKey, layers: range | None, out: Tensor | None) -> Tensor | None:
        found, rows = self._load([key], layers, None if out is None else out[None])
        if not found[0] or rows is None:
            return None
        return rows[0] if out is None else out

    def _load(
        self, keys: Sequence[BlockKey], layers: range | None, out: Tensor | None
    ) -> tuple[list[bool], Tensor | None]:
        """Which blocks, all of one shape, are now in the rows of `out`, and that.

        Step by step for all: Python takes three times as long after a copy of 2 MiB, which leaves
        nothing of it in the CPU's caches.
        """
        try:
            with self.reading() as txn:
                entries = [self._find(txn, key) for key in keys]
                reads, out = self._planned(entries, layers, out)
                parts = [part for read in reads if read for part in read.parts]
                self._env.values_guard.renew()
                copy(parts, self._env.values, self._env.ways)
            return [read is not None and self._finish(read) for read in reads], out
        except CorruptRecord as error:  # no block's own: the tables
            if out is not None and len(keys) > 1:
                pairs = zip(keys, out, strict=True)
                return [self._one(key, layers, row) is not None for key, row in pairs], out
            self.quarantine(keys[0].digest, str(error))
            return [False], out

    def _find(self, txn: lmdb.Transaction, key: BlockKey) -> Entry | None:
        """The entry of a block that is served."""
        if key.digest in self._bad:
            return None
        try:
            entry = self.ledger.get(txn, key.digest)
            if entry is not None:
                check_is_for(entry, key)
            return entry
        except CorruptRecord as error:
            self.quarantine(key.digest, str(error))
            return None

    def _planned(
        self, entries: Sequence[Entry | None], layers: range | None, out: Tensor | None
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

    def _finish(self, read: Read) -> bool:
        """Whether all of it is there, verified."""
        try:
            if not all(part.is_right() for part in read.parts) and not self._is_right_again(read):
                return False
            for part in read.parts:
                part.decode()
                part.deliver()
            return True
        except CorruptRecord as error:
            self.quarantine(read.entry.key.digest, str(error))
            return False

    def _is_right_again(self, read: Read) -> bool:
        """Copy once more what was not right, without the map; False: the block is gone by now.

        Raises:
            CorruptRecord: it is there, and damaged.
        """
        with self.reading() as txn:
            now = self.ledger.get(txn, read.entry.key.digest)
            if now is None or now.page != read.entry.page:
                return False
            for part in read.parts:
                part.copy(self._env.values)
        for part in read.parts:
            part.check()
        return True

    def records(self, digest: bytes) -> tuple[Entry, list[memoryview]] | None:
        """A block as it is stored, every record verified; None if it is not there.

        Raises:
            CorruptRecord: it is damaged.
        """
        entry: Entry | None = None
        while True:  # as often as it moves
            with self.reading() as txn:
                before, entry = entry, self.ledger.get(txn, digest)
            if entry is None:
                return None
            pages = zip(entry.pages, entry.sizes, strict=True)
            try:
                found = [self._env.values.record(page, size) for page, size in pages]
                for layers, value in zip(entry.groups, found, strict=True):
                    record.verify(value, entry.key, layers, entry.shape, entry.dtype)
                return entry, found
            except (CorruptRecord, OSError) as error:
                if before is not None and before.page == entry.page:
                    raise CorruptRecord(str(error)) from error

    def _has(self, txn: lmdb.Transaction, key: BlockKey) -> bool:
        stored = txn.get(key.digest, db=self._env.entries)
        if stored is None or key.digest in self._bad:
            return False
        if not matches(stored, key):
            self.quarantine(key.digest, "its entry is damaged or of another block")
            return False
        return True

    def _mend(self) -> None:
        """A damaged entry that nobody reads would keep what it rests on for ever: delete it."""
        with self.reading() as txn:
            damaged = self.ledger.damaged(txn)
        for digest in damaged:
            self.quarantine(digest, "its entry is damaged")
        with self.changing() as txn:
            self.ledger.recount(txn, [entry.key.digest for entry in self.ledger.entries(txn)])

    def quarantine(self, digest: bytes, reason: str) -> None:
        """Serve the block no more; the next change of the tier deletes it."""
        if digest not in self._bad:
            self._bad[digest] = reason
            self.corrupt += 1
            _log.warning("block %s on disk is corrupt, now a miss: %s", digest.hex(), reason)

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """A short read transaction: LMDB uses none of its pages again that are freed meanwhile."""
        self._check_process()
        with explained(self._env.path), self._env.guard.whole():
            self._env.check_readable()
            with self._env.lmdb.begin(buffers=True) as txn:
                yield txn

    @contextmanager
    def changing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction that first does what reads left to do, all of it or nothing."""
        self._check_process()
        with self._writer, explained(self._env.path):
            bad, stamps = list(self._bad), list(self._stamps)
            self._env.check_place()
            self.ledger.space.forget()
            with self._env.guard.whole() as seen:
                self._env.check_length()
                with self._env.lmdb.begin(write=True, buffers=True) as txn:
                    self.ledger.remove_trees(txn, bad)
                    self.ledger.stamp(txn, stamps)
                    yield txn
                    self.ledger.settle(txn)
                    self._env.guard.check(seen)  # what met a blank page is not committed
            for digest in bad:
                self._bad.pop(digest, None)
            for digest in stamps:
                self._stamps.pop(digest, None)

    def _check_process(self) -> None:
        if os.getpid() != self._env.pid:
            raise StoreError("the disk tier was opened before a fork: open it in the child")
