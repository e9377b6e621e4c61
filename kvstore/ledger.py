"""The books of the disk tier: which blocks are there, who rests on whom, what they cost.

Everything here happens inside a transaction of the caller, so books and records change together.
"""

import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import lmdb
from torch import Tensor

from kvstore import entry as entries
from kvstore import record
from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.codec import DTYPE_CODES, Codec, Payload
from kvstore.codecs.known import LOSSLESS, RAW, codec_for
from kvstore.entry import Entry
from kvstore.environment import Environment
from kvstore.errors import CorruptRecord, MissingParent
from kvstore.extent import first_page, span
from kvstore.layout import layer_groups
from kvstore.quotas import Lack
from kvstore.tally import Groups, Tally, counted, of_tenants
from kvstore.tier import Tier, full

PAGE_BYTES = 4096
_CHECKED = struct.Struct("<QQ")  # a number, and its complement as a check
_ONES = (1 << 64) - 1


def entry_cost(data: Tensor, codec: Codec = RAW) -> int:
    """What a block takes of the budget, at most, if it is written by a lossless codec."""
    parts = [data[g.start : g.stop].shape for g in groups_of(data)]
    return cost_of([codec.payload_bytes(shape, data.dtype) for shape in parts])


def cost_of(payloads: Iterable[int]) -> int:
    """What payloads of these sizes take: whole pages, and the block's share of the tables."""
    pages = sum(span(record.HEADER_BYTES + nbytes, PAGE_BYTES) for nbytes in payloads)
    return 512 + pages * PAGE_BYTES


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
        return cost_of(payload.nbytes for payload in self.payloads)


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


def name(digest: bytes, group: int) -> bytes:
    return digest + group.to_bytes(2, "big")


class Ledger:
    """Entries, records and the count of used bytes, in one LMDB environment."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self._tally = Tally(env)
        # Unpacking takes 15 us of a read of 2 MiB's 250. The bytes are part of what is looked up
        # here, so nothing goes stale.
        self._unpack = lru_cache(maxsize=4096)(entries.unpack)

    def used(self, txn: lmdb.Transaction) -> int:
        used = self._checked(txn, b"used")
        return sum(entry.nbytes for entry in self.entries(txn)) if used is None else used

    def groups(self, txn: lmdb.Transaction) -> Groups:
        """How much belongs to whom."""
        known = self._tally.read(txn)
        return counted((e.group, e.nbytes) for e in self.entries(txn)) if known is None else known

    def get(self, txn: lmdb.Transaction, digest: bytes) -> Entry | None:
        """The entry of a block, None if absent. Raises CorruptRecord."""
        stored = txn.get(digest, db=self.env.entries)
        return None if stored is None else self._unpack(digest, bytes(stored))

    def sound(self, txn: lmdb.Transaction, digest: bytes) -> Entry | None:
        """The entry of a block; None if absent or damaged (a read or an audit deals with that)."""
        try:
            return self.get(txn, digest)
        except CorruptRecord:
            return None

    def record(self, txn: lmdb.Transaction, digest: bytes, group: int) -> memoryview:
        """A record's bytes, valid within the transaction. Raises CorruptRecord if absent."""
        value = txn.get(name(digest, group), db=self.env.data)
        if value is None:
            raise CorruptRecord(f"record of layer group {group} is absent")
        return memoryview(value)

    def entries(self, txn: lmdb.Transaction) -> Iterator[Entry]:
        """All entries that are whole, by digest."""
        for digest, stored in txn.cursor(self.env.entries):
            try:
                yield entries.unpack(bytes(digest), stored)
            except CorruptRecord:
                continue  # of no chain; an audit reports it, a read quarantines it

    def add(self, txn: lmdb.Transaction, block: Packed) -> None:
        """Write a block that is absent. Raises MissingParent."""
        key, data = block.key, block.data
        if key.parent is not None:
            self._count_child(txn, key.parent, 1, required=True)
        pages = self._add_records(txn, block)
        new = Entry(
            key, data.dtype, data.shape, len(groups_of(data)[0]), block.codec, block.cost,
            self._ticks(txn, 1), 0, pages, tuple(payload.nbytes for payload in block.payloads),
        )  # fmt: skip
        self._count(txn, new, 1)
        self._put(txn, new)

    def _add_records(self, txn: lmdb.Transaction, block: Packed) -> tuple[int, ...]:
        """Write the KV of a block; the pages it went to."""
        pages, key, data = [], block.key, block.data
        groups = groups_of(data)
        for number, (layers, payload) in enumerate(zip(groups, block.payloads, strict=True)):
            value = record.sealed(payload, key, layers, data.shape, data.dtype, block.codec)
            txn.put(name(key.digest, number), value, db=self.env.data)
            written = self.record(txn, key.digest, number)
            pages.append(first_page(written, self.env.page_bytes))
        return tuple(pages)

    def lack(
        self,
        txn: lmdb.Transaction,
        blocks: Iterable[Packed],
        capacity_bytes: int,
        limits: Mapping[bytes, int],
    ) -> Lack:
        """What has to go before absent blocks may come."""
        needs: Counter[bytes] = Counter()
        for block in blocks:
            needs[block.key.tenant] += block.cost
        used = of_tenants(self.groups(txn)) if limits else {}
        return Lack(self.used(txn) + needs.total() - capacity_bytes, used, needs, limits)

    def make_room(
        self, txn: lmdb.Transaction, lack: Lack, victims: Iterable[bytes], tier: Tier
    ) -> list[bytes]:
        """Delete victims until nothing lacks; those that went. Raises TierFull.

        A victim on which another process has put a block in the meantime is passed over.
        """
        gone = []
        for digest in victims:
            if not lack:
                break
            entry = self.sound(txn, digest)
            if entry is not None and not entry.children and lack.of(entry.key.tenant):
                self._remove(txn, entry)
                gone.append(digest)
                lack.gone(entry.key.tenant, entry.nbytes)
        if lack:
            raise full(tier, lack)
        return gone

    def remove_trees(self, txn: lmdb.Transaction, digests: Sequence[bytes]) -> None:
        """Delete blocks with all that rests on them, however damaged their books are."""
        if not digests:
            return
        known = {entry.key.digest: entry for entry in self.entries(txn)}
        rests_on: dict[bytes | None, list[bytes]] = defaultdict(list)
        for entry in known.values():
            rests_on[entry.key.parent].append(entry.key.digest)
        doomed = dict.fromkeys(digests)
        queue = list(doomed)
        for digest in queue:
            queue += [child for child in rests_on[digest] if child not in doomed]
            doomed |= dict.fromkeys(rests_on[digest])
        for digest in doomed:
            self.erase(txn, digest)
        parents = {known[d].key.parent for d in doomed if d in known} - doomed.keys() - {None}
        self.recount(txn, parents)

    def recount(self, txn: lmdb.Transaction, parents: Iterable[bytes | None]) -> None:
        """Set the used bytes, in all and by group, and the children of `parents`, anew."""
        children: dict[bytes | None, int] = defaultdict(int)
        members = []
        for entry in self.entries(txn):
            children[entry.key.parent] += 1
            members.append((entry.group, entry.nbytes))
        for parent in parents:
            if parent is not None and (above := self.sound(txn, parent)) is not None:
                self._put(txn, replace(above, children=children[parent]))
        self._set_used(txn, sum(nbytes for _, nbytes in members))
        self._tally.set(txn, counted(members))

    def stamp(self, txn: lmdb.Transaction, digests: Sequence[bytes]) -> None:
        """Note uses, least recent first."""
        if not digests:
            return
        first = self._ticks(txn, len(digests))
        for i, digest in enumerate(digests):
            if (entry := self.sound(txn, digest)) is not None:
                self._put(txn, replace(entry, stamp=first + i))

    def clear(self, txn: lmdb.Transaction) -> None:
        for table in (self.env.data, self.env.entries):
            txn.drop(table, delete=False)
        self._set_used(txn, 0)
        self._tally.set(txn, {})

    def _remove(self, txn: lmdb.Transaction, entry: Entry) -> None:
        """Delete a block on which nothing rests, and keep the books."""
        for number in range(len(entry.groups)):
            txn.delete(name(entry.key.digest, number), db=self.env.data)
        self._count(txn, entry, -1)
        txn.delete(entry.key.digest, db=self.env.entries)
        if entry.key.parent is not None:
            self._count_child(txn, entry.key.parent, -1)

    def erase(self, txn: lmdb.Transaction, digest: bytes) -> None:
        """Delete whatever is stored under a digest; the caller recounts."""
        txn.delete(digest, db=self.env.entries)
        cursor = txn.cursor(self.env.data)
        while cursor.set_range(digest) and bytes(cursor.key())[: len(digest)] == digest:
            cursor.delete()

    def _count_child(
        self, txn: lmdb.Transaction, parent: bytes, change: int, *, required: bool = False
    ) -> None:
        entry = self.sound(txn, parent)
        if entry is not None:
            self._put(txn, replace(entry, children=entry.children + change))
        elif required:
            raise MissingParent(f"block {parent.hex()} must be on disk before those built on it")

    def _put(self, txn: lmdb.Transaction, entry: Entry) -> None:
        txn.put(entry.key.digest, entry.pack(), db=self.env.entries)

    def _count(self, txn: lmdb.Transaction, entry: Entry, blocks: int) -> None:
        """Note that a block came (1), or goes (-1)."""
        self._set_used(txn, self.used(txn) + blocks * entry.nbytes)
        self._tally.change(txn, entry.group, blocks * entry.nbytes, blocks)

    def _ticks(self, txn: lmdb.Transaction, count: int) -> int:
        """The first of `count` stamps: the time, but behind all before, where it was set back."""
        first = max(time.time_ns(), (self._checked(txn, b"last stamp") or 0) + 1)
        self._set_checked(txn, b"last stamp", first + count - 1)
        return first

    def _set_used(self, txn: lmdb.Transaction, used: int) -> None:
        self._set_checked(txn, b"used", used)

    def _checked(self, txn: lmdb.Transaction, name: bytes) -> int | None:
        """A number of the whole store; None if it is absent or damaged."""
        stored = txn.get(name, db=self.env.info)
        if stored is None or len(stored) != _CHECKED.size:
            return None
        number, check = _CHECKED.unpack(stored)
        return int(number) if number ^ check == _ONES else None

    def _set_checked(self, txn: lmdb.Transaction, name: bytes, number: int) -> None:
        txn.put(name, _CHECKED.pack(number, number ^ _ONES), db=self.env.info)
