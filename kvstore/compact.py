"""A store's file made as small as what it holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb

from kvstore import entry as entries
from kvstore.environment import DATA_FILE, MIN_MAP_BYTES, UNFINISHED, explained, verify_file
from kvstore.errors import CorruptRecord, StoreError
from kvstore.extent import first_page
from kvstore.ledger import name
from native.folders import sync_folder

_AT_ONCE = 256  # entries in a transaction


def compact(path: Path) -> tuple[int, int]:
    """Bytes of the data file before and after. For a store that nobody has open.

    LMDB's file never shrinks by itself: freed pages are used again, so it is as large as what it
    ever held at one time. The copy is whole and synced before it takes the file's place, in one
    step; a crash leaves one or the other, and maybe a part of a copy, which goes when the store is
    opened next. Whoever opens the store meanwhile waits.

    Raises:
        StoreError: some process has it open, it is damaged, or there is no room for a copy.
    """
    file = path / DATA_FILE
    with explained(path), _nobody_else(path):
        verify_file(path)
        before = file.stat().st_size
        with TemporaryDirectory(dir=path, prefix=UNFINISHED) as made:
            with _opened(path, readonly=True) as old:
                old.copy(made, compact=True)
            with _opened(Path(made), readonly=False) as new:
                _place(new)
                new.sync(True)
            os.replace(Path(made) / DATA_FILE, file)
        sync_folder(path)
        return before, file.stat().st_size


def _opened(path: Path, *, readonly: bool) -> lmdb.Environment:
    """Without LMDB's lock file: closing that would give up the lock on it."""
    return lmdb.open(
        str(path), map_size=MIN_MAP_BYTES, max_dbs=3, lock=False, readonly=readonly, mode=0o600
    )


def _place(env: lmdb.Environment) -> None:
    """Let every entry name the pages that its records lie on by now."""
    data, books = (env.open_db(table, create=False) for table in (b"data", b"entries"))
    page_bytes = env.stat()["psize"]
    with env.begin(db=books) as txn:
        digests = [bytes(key) for key in txn.cursor().iternext(keys=True, values=False)]
    for first in range(0, len(digests), _AT_ONCE):
        with env.begin(write=True, buffers=True) as txn:
            for digest in digests[first : first + _AT_ONCE]:
                try:
                    entry = entries.unpack(digest, bytes(txn.get(digest, b"", db=books)))
                except CorruptRecord:
                    continue  # a read quarantines it
                records = [txn.get(name(digest, i), db=data) for i in range(len(entry.groups))]
                pages = tuple(0 if r is None else first_page(r, page_bytes) for r in records)
                txn.put(digest, replace(entry, pages=pages).pack(), db=books)


@contextmanager
def _nobody_else(path: Path) -> Iterator[None]:
    """Hold LMDB's lock as who opens a store first does; the next waits until that is given up."""
    with (path / "lock.mdb").open("r+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except (BlockingIOError, PermissionError):
            raise StoreError(
                f"{path} is open in another process: end it, then compact the store"
            ) from None
        yield
