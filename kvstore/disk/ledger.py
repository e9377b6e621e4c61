"""The books of the disk tier: which blocks are there, where, who rests on whom, what they cost.

Everything here happens inside a transaction of the caller, so all books change together.
"""

import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import lmdb

from kvstore.disk import entry as entries
from kvstore.disk.entry import Entry
from kvstore.disk.environment import Environment
from kvstore.disk.packed import Packed
from kvstore.disk.space import Extent, Space
from kvstore.disk.values import pages_of
from kvstore.errors import CorruptRecord, MissingParent
from kvstore.quotas import Lack
from kvstore.tally import Groups, Tally, counted, of_tenants
from kvstore.tier import Tier, full

SLACK = 64  # a part in so many of the budget
_CHECKED = struct.Struct("<QQ")  # a number, and its complement as a check
_ONES = (1 << 64) - 1


class Ledger:
    """Entries, free pages and the count of used bytes, in one LMDB environment.

    `passed_over`: whether a victim of the last `make_room` had to stay. `changed`: whether a block
    came, went or was used, for who sets it before.
    """

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.passed_over = self.changed = False
        self.space = Space(env.info)
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

    def entries(self, txn: lmdb.Transaction) -> Iterator[Entry]:
        """All entries that are whole, by digest."""
        for digest, stored in txn.cursor(self.env.entries):
            try:
                yield entries.unpack(bytes(digest), stored)
            except CorruptRecord:
                continue  # of no chain; an audit reports it, a read quarantines it

    def damaged(self, txn: lmdb.Transaction) -> list[bytes]:
        """The digests of all others."""
        whole = {entry.key.digest for entry in self.entries(txn)}
        there = txn.cursor(self.env.entries).iternext(keys=True, values=False)
        return [digest for digest in map(bytes, there) if digest not in whole]

    def shrink(self, txn: lmdb.Transaction, capacity_bytes: int) -> None:
        """Let the file take not much more of the disk than the budget: holes for free pages.

        Blocks of unlike sizes leave extents that fit none for long; the smallest go first.
        """
        values = self.env.values
        excess = values.disk_bytes - capacity_bytes
        if excess <= capacity_bytes // SLACK:
            return
        for extent in self.space.free(txn):
            if excess <= 0:
                break
            excess -= values.punch(*extent)

    def place(self, txn: lmdb.Transaction, block: Packed) -> Entry:
        """Pages for a block that is absent, and what will be known of it."""
        pages = sum(map(pages_of, block.sizes))
        page = self.space.take(txn, pages, lambda: self._behind(txn))
        return block.entry(page, self._ticks(txn, 1))

    def _behind(self, txn: lmdb.Transaction) -> int:
        """A page behind all that entries name, and all that the file has."""
        ends = (extent.end for extent in self.extents(txn))
        return max(self.env.values.pages, max(ends, default=0))

    def add(self, txn: lmdb.Transaction, new: Entry) -> None:
        """Note a block whose pages are written. Raises MissingParent."""
        if new.key.parent is not None:
            self._count_child(txn, new.key.parent, 1, required=True)
        self._count(txn, new, 1)
        self._put(txn, new)

    def settle(self, txn: lmdb.Transaction) -> None:
        """To be called before the commit of every change."""
        self.space.settle(txn, self.extents(txn))

    def extents(self, txn: lmdb.Transaction) -> Iterator[Extent]:
        """The pages of all blocks."""
        return (entry.extent for entry in self.entries(txn))

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
        gone, self.passed_over = [], False
        for digest in victims:
            if not lack:
                break
            entry = self.sound(txn, digest)
            if entry is None or entry.children:
                self.passed_over = True
            elif lack.of(entry.key.tenant):
                self._remove(txn, entry)
                gone.append(digest)
                lack.gone(entry.key.tenant, entry.nbytes)
        if lack:
            raise full(tier, lack)
        return gone

    def remove_trees(self, txn: lmdb.Transaction, digests: Sequence[bytes]) -> list[bytes]:
        """Delete blocks with all that rests on them, however damaged their books are; which."""
        if all(txn.get(digest, db=self.env.entries) is None for digest in digests):
            return []
        known = {entry.key.digest: entry for entry in self.entries(txn)}
        rests_on: dict[bytes | None, list[bytes]] = defaultdict(list)
        for entry in known.values():
            rests_on[entry.key.parent].append(entry.key.digest)
        doomed = dict.fromkeys(digests)
        queue = list(doomed)
        for digest in queue:
            queue += [child for child in rests_on[digest] if child not in doomed]
            doomed |= dict.fromkeys(rests_on[digest])
        for digest in doomed.keys() & known.keys():
            self._remove(txn, known[digest])
        damaged = [digest for digest in doomed if txn.delete(digest, db=self.env.entries)]
        if damaged:  # which do not say what they rested on, and took
            self.recount(txn, known)
        return list(doomed)

    def recount(self, txn: lmdb.Transaction, parents: Iterable[bytes | None]) -> None:
        """Set anew: used bytes, in all and by group, free pages, and the children of `parents`."""
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
        self.space.doubt()

    def stamp(self, txn: lmdb.Transaction, digests: Sequence[bytes]) -> None:
        """Note uses, least recent first."""
        if not digests:
            return
        first = self._ticks(txn, len(digests))
        for i, digest in enumerate(digests):
            if (entry := self.sound(txn, digest)) is not None:
                self._put(txn, replace(entry, stamp=first + i))

    def clear(self, txn: lmdb.Transaction) -> None:
        txn.drop(self.env.entries, delete=False)
        self._set_used(txn, 0)
        self._tally.set(txn, {})
        self.space.doubt()

    def _remove(self, txn: lmdb.Transaction, entry: Entry) -> None:
        """Delete a block on which nothing rests, and keep the books."""
        self.space.give(entry.extent)
        self._count(txn, entry, -1)
        txn.delete(entry.key.digest, db=self.env.entries)
        if entry.key.parent is not None:
            self._count_child(txn, entry.key.parent, -1)

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
        self.changed = True
        txn.put(name, _CHECKED.pack(number, number ^ _ONES), db=self.env.info)
