"""The folder of a disk tier in use: transactions, and what reads leave to the next change."""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb

from kvstore.disk.environment import open_environment
from kvstore.disk.explained import explained
from kvstore.disk.ledger import Ledger
from kvstore.errors import StoreError

_log = logging.getLogger(__name__)


class Access:
    """LMDB and the file of values, opened once a process and folder. Thread-safe.

    A read may find a block damaged, or note its use, and changes nothing: the next change does.
    """

    def __init__(self, path: Path) -> None:
        self.env = open_environment(path)
        self.ledger = Ledger(self.env)
        self.bad: dict[bytes, str] = {}  # quarantine: digest -> reason
        self.corrupt = 0  # found so far
        self.stamps: dict[bytes, None] = {}  # uses not yet written, least recent first
        self._writer = threading.Lock()  # guards what follows
        self.renewed = False  # what is known of the blocks may be wrong: see `news`
        self._seen = int(self.env.lmdb.info()["last_txnid"])  # the last commit that was no news

    def quarantine(self, digest: bytes, reason: str) -> None:
        """Serve the block no more; the next change deletes it."""
        if digest not in self.bad:
            self.bad[digest] = reason
            self.corrupt += 1
            _log.warning("block %s on disk is corrupt, now a miss: %s", digest.hex(), reason)

    def touched(self, digests: Sequence[bytes]) -> None:
        """They were used now."""
        for digest in digests:
            self.stamps.pop(digest, None)
            self.stamps[digest] = None

    def news(self) -> bool:
        """Whether blocks went, or other processes have changed something, since the last call."""
        with self._writer:
            found, self.renewed = self.renewed, False
            return found

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """A short read transaction: LMDB uses none of its pages again that are freed meanwhile."""
        self._check_process()
        with explained(self.env.path), self.env.guard.whole():
            self.env.check_readable()
            with self._transaction() as txn:
                yield txn

    @contextmanager
    def changing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction that first does what reads left to do, all of it or nothing."""
        self._check_process()
        with self._writer, explained(self.env.path):
            bad, stamps = list(self.bad), list(self.stamps)
            self.env.check_place()
            self.ledger.space.forget()
            with self.env.guard.whole() as seen:
                self.env.check_length()
                with self._transaction(write=True) as txn:
                    before = txn.id() - 1
                    self.renewed |= before != self._seen or bool(bad)
                    self._seen, self.ledger.changed = before, False
                    self.ledger.remove_trees(txn, bad)
                    self.ledger.stamp(txn, stamps)
                    yield txn
                    self.ledger.settle(txn)
                    self.env.guard.check(seen)  # what met a blank page is not committed
            self._seen += self.ledger.changed  # else there was nothing to commit
            for digest in bad:
                self.bad.pop(digest, None)
            for digest in stamps:
                self.stamps.pop(digest, None)

    def mend(self) -> None:
        """A damaged entry that nobody reads would keep what it rests on for ever: delete it."""
        with self.reading() as txn:
            damaged = self.ledger.damaged(txn)
        for digest in damaged:
            self.quarantine(digest, "its entry is damaged")
        with self.changing() as txn:
            self.ledger.recount(txn, [entry.key.digest for entry in self.ledger.entries(txn)])
        self.renewed = True

    def give_back(self) -> None:
        """Free pages become holes: what was deleted can be read from the file no more.

        Nobody takes one meanwhile; whoever is reading one finds that it is not what it was.
        """
        with self.changing() as txn:
            for extent in self.ledger.space.unused(txn, self.env.values.pages):
                self.env.values.punch(*extent)

    def close(self) -> None:
        try:
            if (self.stamps or self.bad) and self.env.is_writable():
                with suppress(StoreError), self.changing():  # else uses and damage are forgotten
                    pass
        finally:
            self.env.close()

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        """One of LMDB's."""
        self.env.under_way.append(None)
        try:
            with self.env.lmdb.begin(write=write, buffers=True) as txn:
                yield txn
        finally:
            self.env.under_way.pop()

    def _check_process(self) -> None:
        if os.getpid() != self.env.pid:
            raise StoreError("the disk tier was opened before a fork: open it in the child")
