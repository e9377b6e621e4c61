"""Blocks of running requests on disk: the values in LMDB, where they are in memory here."""

import fcntl
import os
import shutil
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from jaxtyping import UInt8
from xxhash import xxh3_64_intdigest

from kvstore.disk.extent import MAP_BYTES, UNKNOWN, DataFile, first_page, span
from kvstore.disk.sound import DATA_FILE
from kvstore.errors import CorruptRecord, StoreError

BATCH_BYTES = 4 << 20  # of one transaction: 3.1 GB/s, with 16 MiB 1.7 (LMDB takes memory for them)
READERS = 4  # threads, where several blocks are wanted
PREFIX = ".headrace-spill-"  # of its folders
MADE = {DATA_FILE, "lock.mdb", "owner"}  # there
Bytes = UInt8[np.ndarray, " N"]


class _Place(NamedTuple):
    page: int
    checksum: int


class Spill:
    """Numbered blocks of one pool on disk. Not a cache: what is lost here ends a request.

    An LMDB environment in a folder of its own below `path`, mode 0700, never flushed: it goes
    when it is closed or the process ends, and what killed processes left goes at the next
    opening. Where a block is, and its checksum, stay in memory. Blocks are not deleted: the pool
    gives their numbers to others, which bounds the file by the budget and some batches.

    Args:
        capacity_bytes: of all blocks that requests may have, in memory or not.
    Raises:
        StoreError: naming the path, if it cannot be used, is full, or ends before a block does.
        CorruptRecord: for a block that is not what was written.
    """

    setting = "spill_bytes"

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self.path, self.capacity_bytes = path, capacity_bytes
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._places: dict[int, _Place] = {}
        with _explained(path):
            self.folder, self._remove = _claim(path, self)
            self._env = self._opened()
            self._page_bytes = self._env.stat()["psize"]
            self._values = DataFile(self.folder / DATA_FILE, self._page_bytes)
        self._threads = ThreadPoolExecutor(READERS, "headrace-spill")

    def cost(self, nbytes: int) -> int:
        """Bytes of disk that a block of `nbytes` takes: whole pages."""
        return span(nbytes, self._page_bytes) * self._page_bytes

    def write(self, blocks: Sequence[tuple[int, Bytes]]) -> None:
        """Keep these bytes under these numbers; what had the numbers before is gone."""
        self._check_process()
        size = max(1, BATCH_BYTES // max((len(data) for _, data in blocks), default=1))
        for lo in range(0, len(blocks), size):
            with self._lock, _explained(self.path):
                self._places |= self._put(blocks[lo : lo + size])

    def read(self, blocks: Sequence[tuple[int, Bytes]]) -> None:
        """Fill each buffer with the block of that number; undefined if this raises."""
        self._check_process()
        if len(blocks) == 1:
            return self._fetch(*blocks[0])
        fetched = [self._threads.submit(self._fetch, *block) for block in blocks]
        wait(fetched)  # for all: after an error nobody may still write to the buffers
        for future in fetched:
            future.result()
        return None

    def close(self) -> None:
        """Delete everything. Idempotent."""
        self._threads.shutdown()
        self._values.close()
        self._env.close()
        self._remove()

    def _put(self, blocks: Sequence[tuple[int, Bytes]]) -> dict[int, _Place]:
        places = {}
        with self._begin(write=True) as txn:
            for number, data in blocks:
                txn.put(_key(number), data.data)
                page = first_page(_value(txn, number), self._page_bytes)
                places[number] = _Place(page, xxh3_64_intdigest(data.data))
        return places

    def _fetch(self, number: int, out: Bytes) -> None:
        place = self._places[number]
        with _explained(self.path):
            if place.page == UNKNOWN:  # small, or an LMDB with other pages
                with self._lock, self._begin(write=False) as txn:
                    out[:] = np.frombuffer(_value(txn, number), np.uint8)
            elif not self._values.read(place.page, [out]):
                raise StoreError(f"{self.folder} was cut short: block {number} is lost")
        if xxh3_64_intdigest(out.data) != place.checksum:
            raise CorruptRecord(f"block {number} in {self.folder} is not what was written there")

    def _begin(self, *, write: bool) -> lmdb.Transaction:
        """A transaction. The lock is held."""
        try:
            return self._env.begin(write=write, buffers=True)
        except lmdb.PanicError:  # a commit failed in its last step; the one before it holds
            self._env.close()
            self._env = self._opened()
            return self._env.begin(write=write, buffers=True)

    def _opened(self) -> lmdb.Environment:
        return lmdb.open(
            str(self.folder), map_size=max(4 * self.capacity_bytes, MAP_BYTES), mode=0o600,
            sync=False, metasync=False, max_readers=1024,
        )  # fmt: skip

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError("the spill was opened before a fork: open one in the child")


def _key(number: int) -> bytes:
    return struct.pack(">Q", number)


def _value(txn: lmdb.Transaction, number: int) -> memoryview:
    value = txn.get(_key(number))
    assert value is not None, "only places of written blocks are remembered"
    return memoryview(value)


def _claim(path: Path, owner: Spill) -> tuple[Path, Callable[[], object]]:
    """A new private folder, locked for as long as the process lives, and what removes it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path / "spill.lock", flags, 0o600)) as door:
        fcntl.flock(door, fcntl.LOCK_EX)  # nobody sweeps a folder before it has its owner
        _sweep(path)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path))
        handle = os.open(folder / "owner", flags, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, weakref.finalize(owner, _remove, folder, handle, os.getpid())


def _sweep(path: Path) -> None:
    """Remove the folders whose owner's lock went with its process; others may be doing so, too."""
    for folder in path.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError, NotADirectoryError):  # it goes just now, or is a file
            if folder.lstat().st_uid == os.getuid() and MADE.issuperset(os.listdir(folder)):
                _remove_abandoned(folder)


def _remove_abandoned(folder: Path) -> None:
    """One without an owner's file lost it while it was removed."""
    if not (folder / "owner").exists():
        shutil.rmtree(folder, ignore_errors=True)
        return
    with (folder / "owner").open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # it lives
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, handle: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child's exit leaves it alone
        shutil.rmtree(folder, ignore_errors=True)  # something may have cleaned up already
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of LMDB and the system into the store's, with what to do about them."""
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise StoreError(
            f"cannot keep blocks of running requests in {path} ({error}): free space there, lower "
            "spill_bytes, or choose another spill_path"
        ) from error
