"""Blocks of running requests on disk: the values in LMDB, and which blocks are in memory."""

import fcntl
import os
import shutil
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor
from xxhash import xxh3_64_intdigest

from kvstore.environment import DATA_FILE, MIN_MAP_BYTES
from kvstore.errors import CorruptRecord, PoolFull, StoreError
from kvstore.extent import UNKNOWN, DataFile, first_page, span

BATCH_BYTES = 4 << 20  # of one transaction: 3.1 GB/s, with 16 MiB 1.7 (LMDB takes memory for them)
Bytes = UInt8[np.ndarray, " N"]
Numbers = Int[np.ndarray, " _"]


@dataclass(slots=True)
class SpillStats:
    """Blocks of one layer, unless a name says bytes."""

    hits: int = 0  # wanted and in memory
    promotions: int = 0  # wanted and read from disk
    evictions: int = 0  # made to leave memory
    spilled_bytes: int = (
        0  # written: an evicted block that has not changed since is on disk already
    )
    read_bytes: int = 0

    def __add__(self, other: "SpillStats") -> "SpillStats":
        return SpillStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


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
        threads: that read, where several blocks are wanted.
    Raises:
        StoreError: naming the path, if it cannot be used, is full, or ends before a block does.
        CorruptRecord: for a block that is not what was written.
    """

    setting = "spill_bytes"

    def __init__(self, path: Path, capacity_bytes: int, *, threads: int = 4) -> None:
        self.path, self.capacity_bytes = path, capacity_bytes
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._places: dict[int, _Place] = {}
        with _explained(path):
            self.folder, self._remove = _claim(path, self)
            self._env = lmdb.open(
                str(self.folder), map_size=max(4 * capacity_bytes, MIN_MAP_BYTES), mode=0o600,
                sync=False, metasync=False, max_readers=1024,
            )  # fmt: skip
            self._page_bytes = self._env.stat()["psize"]
            self._values = DataFile(self.folder / DATA_FILE, self._page_bytes)
        self._threads = ThreadPoolExecutor(threads, "headrace-spill")

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
        with self._env.begin(write=True, buffers=True) as txn:
            for number, data in blocks:
                txn.put(_key(number), data.data)
                page = first_page(_value(txn, number), self._page_bytes)
                places[number] = _Place(page, xxh3_64_intdigest(data.data))
        return places

    def _fetch(self, number: int, out: Bytes) -> None:
        place = self._places[number]
        with _explained(self.path):
            if place.page == UNKNOWN:  # small, or an LMDB with other pages
                with self._env.begin(buffers=True) as txn:
                    out[:] = np.frombuffer(_value(txn, number), np.uint8)
            elif not self._values.read(place.page, [out]):
                raise StoreError(f"{self.folder} was cut short: block {number} is lost")
        if xxh3_64_intdigest(out.data) != place.checksum:
            raise CorruptRecord(f"block {number} in {self.folder} is not what was written there")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError("the spill was opened before a fork: open one in the child")


class Slots:
    """Which blocks of one layer are in memory. Callers hold `lock` while they use an answer.

        nowhere -> in a slot, newer than the disk <-> in a slot, as on disk <-> on disk alone

    Args:
        slab: a slot for each of its blocks.
        setting: budget of the slots, for errors.
    """

    def __init__(
        self, layer: int, slab: UInt8[Tensor, "slots Hk P row"], num_blocks: int, spill: Spill,
        setting: str,
    ) -> None:  # fmt: skip
        self.lock = threading.RLock()
        self.stats = SpillStats()
        self._memory = slab.view(len(slab), -1).numpy()
        self._first, self._spill, self._setting = layer * num_blocks, spill, setting
        self._slot = np.zeros(num_blocks, np.int64)  # of a resident block
        self._resident = np.zeros(num_blocks, bool)
        self._stored = np.zeros(num_blocks, bool)  # the disk has it as it is
        self._block = np.zeros(len(slab), np.int64)  # in an occupied slot
        self._occupied = np.zeros(len(slab), bool)
        self._used = np.zeros(len(slab), np.int64)  # when; 0 if empty
        self._pins = np.zeros(len(slab), np.int64)
        self._now = 0

    def passes(
        self, blocks: Numbers, *, writing: bool = False
    ) -> Iterator[tuple[Numbers, Numbers]]:
        """Bring blocks into memory, as many at a time as there is room for, resident ones first.

        Yields which of `blocks` are there and in which slots, until the next pass.

        Args:
            writing: they are about to change; those that are nowhere get a slot.
        Raises:
            PoolFull: if all slots are pinned, by others than the blocks.
        """
        absent = ~self._resident[blocks]
        room = int((self._pins == 0).sum()) if absent.any() else max(1, len(blocks))
        if not room:
            raise PoolFull(f"all {len(self._pins)} blocks in memory are held; {self._remedy}")
        order = np.argsort(absent, kind="stable")
        for lo in range(0, len(blocks), room):
            part = order[lo : lo + room]
            yield part, self._bring(blocks[part], writing)

    @contextmanager
    def pinned(self, blocks: Numbers) -> Iterator[Numbers]:
        """The slots of blocks, which stay there meanwhile. Raises PoolFull if they do not fit."""
        with self.lock:
            slots = self._bring(blocks, False)
            self._pins[slots] += 1
        try:
            yield slots
        finally:
            with self.lock:
                self._pins[slots] -= 1

    def forget(self, blocks: Numbers) -> None:
        """The blocks are nowhere now."""
        with self.lock:
            slots = self._slot[blocks[self._resident[blocks]]]
            self._occupied[slots], self._used[slots] = False, 0
            self._resident[blocks] = self._stored[blocks] = False

    def _bring(self, blocks: Numbers, writing: bool) -> Numbers:
        here = self._resident[blocks]
        missing = blocks[~here]
        self.stats.hits += int(here.sum())
        if len(missing):
            self._load(missing, self._vacate(len(missing), keep=self._slot[blocks[here]]))
        if writing:
            self._stored[blocks] = False
        slots = self._slot[blocks]
        self._now += 1
        self._used[slots] = self._now
        return slots

    def _vacate(self, count: int, keep: Numbers) -> Numbers:
        """Empty slots, the least recently used first. Raises PoolFull."""
        free = self._pins == 0
        free[keep] = False
        found = np.flatnonzero(free)
        if len(found) < count:
            raise PoolFull(
                f"{count + len(keep)} blocks of a layer must be in memory at once, and there is "
                f"room for {len(found) + len(keep)}; {self._remedy}"
            )
        slots = found[np.argsort(self._used[found], kind="stable")[:count]]
        self._evict(slots[self._occupied[slots]])
        return slots

    def _evict(self, slots: Numbers) -> None:
        blocks = self._block[slots]
        changed = ~self._stored[blocks]
        written = slots[changed]
        self._spill.write([(self._number(self._block[s]), self._memory[s]) for s in written])
        self._stored[blocks], self._resident[blocks] = True, False
        self._occupied[slots], self._used[slots] = False, 0
        self.stats.evictions += len(slots)
        self.stats.spilled_bytes += len(written) * self._memory.shape[1]

    def _load(self, blocks: Numbers, slots: Numbers) -> None:
        """Put blocks into empty slots, with what the disk has of them."""
        stored = self._stored[blocks]
        pairs = zip(blocks[stored], slots[stored], strict=True)
        self._spill.read([(self._number(b), self._memory[s]) for b, s in pairs])
        self._slot[blocks], self._resident[blocks] = slots, True
        self._block[slots], self._occupied[slots] = blocks, True
        self.stats.promotions += int(stored.sum())
        self.stats.read_bytes += int(stored.sum()) * self._memory.shape[1]

    def _number(self, block: np.int64) -> int:
        return self._first + int(block)

    @property
    def _remedy(self) -> str:
        return f"raise {self._setting}"


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
        folder = Path(tempfile.mkdtemp(prefix="spill-", dir=path))
        handle = os.open(folder / "owner", flags, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, weakref.finalize(owner, _remove, folder, handle, os.getpid())


def _sweep(path: Path) -> None:
    """Remove the folders whose owner's lock went with its process."""
    for file in path.glob("spill-*/owner"):
        if file.lstat().st_uid != os.getuid():
            continue
        with file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # it lives
            shutil.rmtree(file.parent)


def _remove(folder: Path, handle: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child's exit leaves it alone
        shutil.rmtree(folder)
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
