"""Blocks in LMDB."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lmdb
import torch
from jaxtyping import Float
from torch import Tensor

from kvstore import entry as entries
from kvstore import record
from kvstore.block import BlockKey, KVBlock, LayerKV
from kvstore.entry import Entry
from kvstore.environment import explained, open_environment
from kvstore.errors import CorruptRecord, StoreError
from kvstore.extent import UNKNOWN
from kvstore.layout import covering
from kvstore.ledger import Ledger, entry_cost
from kvstore.tier import Item, Resident, check_layers, checked_out

_log = logging.getLogger(__name__)


class DiskTier:
    """Blocks in an LMDB folder, which several processes may share.

    A block, all its records and its entry, is written in one transaction, so it is there whole or
    not at all. The budget counts live pages; freed ones are used again two commits later, so
    the file grows to the budget and about three batches more.

    Reads verify a copy, made inside a short transaction (which keeps the pages from being reused).
    Large values come by `preadv` from the pages that their entry names, so that a sector that
    cannot be read or a file cut short is a miss, where the map would kill the process (SIGBUS);
    should the pages be others (a compacted copy), through the map. That is not for speed: with
    2 MiB values on a throttled 2-core VM it takes 0.85 of the map's hot throughput with one
    thread, 1.06 with two and 0.99 with four; cold 1.3, 1.9 and 2.1 GB/s (the map 1.7, 2.1, 2.0).
    One core copies 13 GB/s out of a map and 6.5 by `preadv`.
    """

    name = "disk"
    setting = "disk_bytes"
    durable = True

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.corrupt = 0
        self._env = open_environment(path, capacity_bytes)
        self.ledger = Ledger(self._env)
        self._bad: dict[bytes, str] = {}  # quarantine: digest -> reason
        self._moved: set[bytes] = set()  # not where their entries say: in a compacted copy
        self._stamps: dict[bytes, None] = {}  # uses not yet written, least recent first
        self._writer = threading.Lock()

    @property
    def quarantined(self) -> int:
        return len(self._bad)

    @property
    def used_bytes(self) -> int:
        with self.reading() as txn:
            return self.ledger.used(txn)

    def cost(self, block: KVBlock) -> int:
        return entry_cost(block.data)

    def put(self, blocks: Sequence[Item], victims: Iterable[bytes] = ()) -> list[bytes]:
        """As Tier.put. Raises MissingParent for a block that no lookup could reach."""
        self.held([key for key, _ in blocks])  # quarantines damaged entries, so they are replaced
        with self.changing() as txn:
            fresh = {k.digest: (k, b) for k, b in blocks if self.ledger.get(txn, k.digest) is None}
            need = sum(self.cost(block) for _, block in fresh.values())
            gone = self.ledger.make_room(txn, need, victims, self)
            for key, block in fresh.values():
                self.ledger.add(txn, key, block)
        self._moved -= fresh.keys()
        return gone

    def get(self, key: BlockKey) -> KVBlock | None:
        data = self._load(key, None, None)
        return None if data is None else KVBlock(data)

    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None:
        return self._load(key, layers, out)

    def layer(self, key: BlockKey, i: int) -> LayerKV | None:
        data = self.read(key, range(i, i + 1))
        return None if data is None else LayerKV(data[0, 0], data[0, 1])

    def delete(self, keys: Sequence[BlockKey | bytes]) -> None:
        with self.changing() as txn:
            self.ledger.remove_trees(txn, [k if isinstance(k, bytes) else k.digest for k in keys])

    def held(self, keys: Sequence[BlockKey]) -> list[bool]:
        try:
            with self.reading() as txn:
                return [self._has(txn, key) for key in keys]
        except CorruptRecord as error:
            _log.warning("all blocks on disk are misses: %s", error)
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
        return (Resident(e.key.digest, e.key.parent, e.nbytes) for e in found)

    def clear(self) -> None:
        with self.changing() as txn:
            self.ledger.clear(txn)

    def close(self) -> None:
        try:
            if self._stamps or self._bad:
                with self.changing():
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

    def _load(self, key: BlockKey, layers: range | None, out: Tensor | None) -> Tensor | None:
        """These layers, or all, copied and verified; None with any doubt."""
        if key.digest in self._bad:
            return None
        try:
            with self.reading() as txn:
                entry = self.ledger.get(txn, key.digest)
                if entry is None:
                    return None
                entries.check_is_for(entry, key)
                layers = range(entry.shape[0]) if layers is None else layers
                check_layers(layers, entry.shape[0])
                shape = torch.Size((len(layers), *entry.shape[1:]))
                if out is None:
                    out = torch.empty(shape, dtype=entry.dtype)
                self._copy(txn, entry, layers, checked_out(out, shape, entry.dtype))
                return out
        except CorruptRecord as error:
            self.quarantine(key.digest, str(error))
            return None

    def _copy(self, txn: lmdb.Transaction, entry: Entry, layers: range, out: Tensor) -> None:
        """Fill `out` group by group; a group that is wanted in part is verified whole."""
        for number, group in covering(entry.shape[0], entry.group_layers, layers):
            lo, hi = max(group.start, layers.start), min(group.stop, layers.stop)
            part = out if group == layers else out[lo - layers.start : hi - layers.start]
            if hi - lo == len(group):
                self._fetch(txn, entry, number, group, part)
                continue
            whole = out.new_empty(len(group), *entry.shape[1:])
            self._fetch(txn, entry, number, group, whole)
            part.copy_(whole[lo - group.start : hi - group.start])

    def _fetch(
        self, txn: lmdb.Transaction, entry: Entry, number: int, group: range, out: Tensor
    ) -> None:
        """Fill `out` with a whole group: from its pages, or else through the map."""
        key, num_layers = entry.key, entry.shape[0]
        page = UNKNOWN if key.digest in self._moved else entry.pages[number]
        if page != UNKNOWN:
            try:
                read = partial(self._env.values.read, page)
                record.read_into(out, read, key, group, num_layers)
                return
            except CorruptRecord:
                self._env.check_length()  # the map must not be touched behind the file's end
            except OSError as error:  # the same pages through the map would be a SIGBUS
                raise CorruptRecord(f"cannot read layer group {number}: {error}") from error
        value = self.ledger.record(txn, key.digest, number)
        record.decode_into(out, value, key, group, num_layers)
        if page != UNKNOWN:
            self._moved.add(key.digest)

    def _has(self, txn: lmdb.Transaction, key: BlockKey) -> bool:
        stored = txn.get(key.digest, db=self._env.entries)
        if stored is None or key.digest in self._bad:
            return False
        if not entries.matches(stored, key):
            self.quarantine(key.digest, "its entry is damaged or of another block")
            return False
        return True

    def quarantine(self, digest: bytes, reason: str) -> None:
        """Serve the block no more; the next change of the tier deletes it."""
        if digest not in self._bad:
            self._bad[digest] = reason
            self.corrupt += 1
            _log.warning("block %s on disk is corrupt, now a miss: %s", digest.hex(), reason)

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """A short read transaction: pages freed while it lasts cannot be used again."""
        self._check_process()
        with explained(self._env.path):
            self._env.check_length()
            with self._env.lmdb.begin(buffers=True) as txn:
                yield txn

    @contextmanager
    def changing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction that first does what reads left to do, all of it or nothing."""
        self._check_process()
        with self._writer, explained(self._env.path):
            bad, stamps = list(self._bad), list(self._stamps)
            with self._env.lmdb.begin(write=True, buffers=True) as txn:
                self.ledger.remove_trees(txn, bad)
                self.ledger.stamp(txn, stamps)
                yield txn
            for digest in bad:
                self._bad.pop(digest, None)
            for digest in stamps:
                self._stamps.pop(digest, None)

    def _check_process(self) -> None:
        if os.getpid() != self._env.pid:
            raise StoreError("the disk tier was opened before a fork: open it in the child")
