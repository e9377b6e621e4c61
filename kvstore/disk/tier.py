"""Blocks on disk: their KV in a file of values, what is known of them in LMDB."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import lmdb
from jaxtyping import Float
from torch import Tensor

from kvstore.block import BlockKey, KVBlock, Precision
from kvstore.codecs.codec import Codec
from kvstore.codecs.known import LOSSLESS, RAW
from kvstore.disk.access import Access
from kvstore.disk.entry import Entry, matches
from kvstore.disk.fetch import SOURCE
from kvstore.disk.loads import load
from kvstore.disk.packed import Packed, entry_cost, packed, write
from kvstore.disk.readers import Readers
from kvstore.disk.writer import BATCH_BYTES
from kvstore.errors import CorruptRecord, TierFull
from kvstore.quotas import Limits
from kvstore.tally import Groups
from kvstore.tier import Item, Resident
from native.heap import keep_freed
from native.library import library

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
        library(SOURCE)  # compiled now: not while a transaction waits
        keep_freed(2 * BATCH_BYTES)  # codecs allocate what they make
        self.access = Access(path)
        self._ledger = self.access.ledger
        self.readers = Readers(self.access.env.lmdb)
        self._threads = ThreadPoolExecutor(WRITE_THREADS, "headrace-disk")
        self._trouble = ""  # of all blocks, when last one was looked for

    @property
    def corrupt(self) -> int:
        return self.access.corrupt

    @property
    def quarantined(self) -> int:
        return len(self.access.bad)

    @property
    def used_bytes(self) -> int:
        with self.access.reading() as txn:
            return self._ledger.used(txn)

    def cost(self, key: BlockKey, block: KVBlock) -> int:
        exact = key.precision is Precision.EXACT
        return entry_cost(block.data, self._codec if exact else LOSSLESS)

    def sizes(self, digests: Sequence[bytes]) -> list[int]:
        with self.access.reading() as txn:
            entries = [self._ledger.sound(txn, digest) for digest in digests]
        return [0 if entry is None else entry.nbytes for entry in entries]

    def put(
        self, blocks: Sequence[Item], victims: Iterable[bytes] = (), limits: Limits | None = None
    ) -> list[bytes]:
        """As Tier.put. Raises MissingParent for a block that no lookup could reach."""
        try:
            return self._put(blocks, victims, limits or {})
        except TierFull:
            if self._ledger.passed_over and not self.access.renewed:  # it was not another process
                self.access.mend()  # who asks again finds room
            raise

    def _put(self, blocks: Sequence[Item], victims: Iterable[bytes], limits: Limits) -> list[bytes]:
        there = self.held([key for key, _ in blocks])  # damaged ones are not, and replaced
        new = {key.digest: (key, b) for (key, b), is_ in zip(blocks, there, strict=True) if not is_}
        made = list(self._threads.map(self._packed, new.values()))
        with self.access.changing() as txn:
            fresh = [block for block in made if self._ledger.get(txn, block.key.digest) is None]
            lack = self._ledger.lack(txn, fresh, self.capacity_bytes, limits)
            gone = self._ledger.make_room(txn, lack, victims, self)
            self._ledger.shrink(txn, self.capacity_bytes)
            placed = [(block, self._ledger.place(txn, block)) for block in fresh]
            self._write(placed)
            for _, entry in placed:
                self._ledger.add(txn, entry)
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
            found += load(self.access, keys[part], layers, out[part])[0]
        return found

    def delete(self, keys: Sequence[BlockKey | bytes]) -> list[bytes]:
        """As Tier.delete. What evicted blocks left goes, too, and what a killed deletion did."""
        digests = [key if isinstance(key, bytes) else key.digest for key in keys]
        with self.access.changing() as txn:
            gone = self._ledger.remove_trees(txn, digests)
        self.access.give_back()
        return gone

    def held(self, keys: Sequence[BlockKey]) -> list[bool]:
        try:
            with self.access.reading() as txn:
                there: dict[bytes, bool] = {}
                for key in keys:  # what rests on a damaged block goes with it, and is looked at
                    there[key.digest] = self._has(txn, key) and there.get(key.parent or b"", True)
                return [there[key.digest] for key in keys]
        except CorruptRecord as error:
            if str(error) != self._trouble:
                _log.warning("all blocks on disk are misses: %s", error)
            self._trouble = str(error)
            return [False] * len(keys)

    def touched(self, digests: Sequence[bytes]) -> None:
        """Remembered here, written with the next change or on closing."""
        self.access.touched(digests)

    def residents(self) -> Iterator[Resident]:
        recent = {digest: i for i, digest in enumerate(list(self.access.stamps), 1)}
        with self.access.reading() as txn:
            found = [_ranked(entry, recent) for entry in self._ledger.entries(txn)]
        found.sort()
        return (resident for *_, resident in found)

    def groups(self) -> Groups:
        with self.access.reading() as txn:
            return self._ledger.groups(txn)

    def news(self) -> bool:
        return self.access.news()

    def clear(self) -> None:
        with self.access.changing() as txn:
            self._ledger.clear(txn)
        self.access.give_back()

    def close(self) -> None:
        self._threads.shutdown()
        self.access.close()

    def __contains__(self, key: BlockKey | bytes | None) -> bool:
        if isinstance(key, BlockKey):
            return self.held([key])[0]
        try:
            with self.access.reading() as txn:
                return key is not None and self._ledger.get(txn, key) is not None
        except CorruptRecord:
            return False

    def _packed(self, item: Item) -> Packed:
        return packed(*item, self._codec)

    def _write(self, placed: Sequence[tuple[Packed, Entry]]) -> None:
        """Write the KV of blocks to their pages, and flush it."""
        values = self.access.env.values
        writing = [self._threads.submit(write, values, *block) for block in placed]
        wait(writing)  # for all: after an error nobody may still write to pages that others take
        for written in writing:
            written.result()
        if writing:
            values.sync()

    def _one(self, key: BlockKey, layers: range | None, out: Tensor | None) -> Tensor | None:
        found, rows = load(self.access, [key], layers, None if out is None else out[None])
        if not found[0] or rows is None:
            return None
        return rows[0] if out is None else out

    def _has(self, txn: lmdb.Transaction, key: BlockKey) -> bool:
        stored = txn.get(key.digest, db=self.access.env.entries)
        if stored is None or key.digest in self.access.bad:
            return False
        if not matches(stored, key):
            self.access.quarantine(key.digest, "its entry is damaged or of another block")
            return False
        return True


def _ranked(entry: Entry, recent: Mapping[bytes, int]) -> tuple[int, int, int, Resident]:
    """A block, behind what it is ordered by. There may be a million, and entries are larger."""
    key = entry.key
    resident = Resident(key.digest, key.parent, entry.nbytes, key.depth, key.tenant)
    return recent.get(key.digest, 0), entry.stamp, -key.depth, resident
