"""A store's files made as small as what it holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import lmdb

from kvstore.disk import entry as entries
from kvstore.disk.entry import Entry
from kvstore.disk.environment import (
    LOCK_FILE,
    UNFINISHED,
    VALUES,
    checked_format,
    files_bytes,
    new_values,
    open_lmdb,
    say_again,
)
from kvstore.disk.explained import explained
from kvstore.disk.extent import MAP_BYTES
from kvstore.disk.sound import DATA_FILE, verify_file
from kvstore.disk.space import Extent, Space
from kvstore.disk.values import PAGE_BYTES
from kvstore.errors import CorruptRecord, StoreError
from native.folders import sync_folder

_AT_ONCE = 8 << 20  # bytes


def compact(path: Path) -> tuple[int, int]:
    """Bytes of the store's files before and after. For a store that nobody has open.

    The files never shrink by themselves: freed pages are used again, so they are as large as what
    they ever held at one time. Copies of both are whole and synced before LMDB's, which names the
    other, takes its place, in one step; a crash leaves the old store or the new one, and maybe
    files of the other, which go when the store is opened next. Whoever opens the store meanwhile
    waits.

    Raises:
        StoreError: some process has it open, it is damaged, or there is no room for a copy.
    """
    with explained(path), _nobody_else(path):
        verify_file(path)
        before = files_bytes(path)
        with TemporaryDirectory(dir=path, prefix=UNFINISHED) as made:
            with _opened(path, readonly=True) as old:
                old.copy(os.fsencode(made), compact=True)  # type: ignore[arg-type]  # takes both
            with _opened(Path(made), readonly=True) as new:
                old_values = path / checked_format(path, new)
            with _gone_if_this_fails(path, new_values(path)) as values:
                with _opened(Path(made), readonly=False) as new:
                    _copy_values(old_values, values, new)
                    say_again(new)
                    new.sync(True)
                sync_folder(path)  # there before it is named
                os.replace(Path(made) / DATA_FILE, path / DATA_FILE)
        sync_folder(path)
        old_values.unlink()
        return before, files_bytes(path)


def _opened(path: Path, *, readonly: bool) -> lmdb.Environment:
    """Without LMDB's lock file: closing that would give up the lock on it."""
    return lmdb.open(
        os.fsencode(path), map_size=MAP_BYTES, max_dbs=2, lock=False, readonly=readonly, mode=0o600
    )


@contextmanager
def _gone_if_this_fails(path: Path, values: Path) -> Iterator[Path]:
    """There may be little room: what is in it goes at once, unless the store names it by then."""
    try:
        yield values
    except BaseException:
        with _opened(path, readonly=True) as env:
            if checked_format(path, env) != values.name:
                values.unlink()
        raise


def _copy_values(old: Path, made: Path, env: lmdb.Environment) -> None:
    """Let the entries name pages of a new file that has no others.

    An entry that is damaged has no pages any more: a read finds that out.
    """
    books, info = (env.open_db(table, create=False) for table in (b"entries", b"info"))
    with env.begin(write=True) as txn, old.open("rb") as source, made.open("wb") as target:
        extents = []
        for entry in sorted(_sound(txn.cursor(books)), key=lambda entry: entry.page):
            extents.append(Extent(target.tell() // PAGE_BYTES, entry.extent.pages))
            _copy(source, target, entry.extent)
            moved = replace(entry, page=extents[-1].start)
            txn.put(entry.key.digest, moved.pack(), db=books)
        target.flush()
        os.fsync(target.fileno())
        space = Space(info)
        space.doubt()
        space.settle(txn, extents)
        txn.put(VALUES, made.name.encode(), db=info)


def _sound(cursor: lmdb.Cursor) -> Iterator[Entry]:
    """The entries that are whole."""
    for digest, stored in cursor:
        with suppress(CorruptRecord):
            yield entries.unpack(bytes(digest), stored)


def _copy(source: BinaryIO, target: BinaryIO, extent: Extent) -> None:
    """Copy pages; those that the file lacks become zeros, which a read finds out."""
    source.seek(extent.start * PAGE_BYTES)
    end = target.tell() + extent.pages * PAGE_BYTES
    while (left := end - target.tell()) > 0:
        part = source.read(min(left, _AT_ONCE))
        target.write(part or bytes(left))


@contextmanager
def _nobody_else(path: Path) -> Iterator[None]:
    """Hold LMDB's lock as who opens a store first does; the next waits until that is given up."""
    _opened(path, readonly=True).close()  # not if it is open here: closing `lock` gave up its lock
    if not (path / LOCK_FILE).exists():  # of a copied store; made as who waits for it expects
        open_lmdb(path).close()
    with (path / LOCK_FILE).open("a+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except (BlockingIOError, PermissionError):
            raise StoreError(
                f"{path} is open in another process: end it, then compact the store"
            ) from None
        yield
