"""Opening an LMDB folder: whose it is, which format, and errors that say what to do."""

import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import lmdb

from kvstore.disk.explained import START_ANEW, explained
from kvstore.disk.extent import MAP_BYTES, DataFile
from kvstore.disk.guard import Guard
from kvstore.disk.sound import DATA_FILE, mend_length, verify_after_boot
from kvstore.disk.space import empty
from kvstore.disk.values import NAME, PREFIX, Values
from kvstore.disk.ways import Ways
from kvstore.errors import CorruptRecord, StoreError, StoreFormatError
from native.folders import sync_folder

if TYPE_CHECKING:
    from lmdb import _Database

UNFINISHED = ".headrace-unfinished-"  # prefix of folders in which a data file is made
LOCK_FILE = "lock.mdb"  # LMDB's: who closes another handle of it gives up the lock on it
MADE = {DATA_FILE, LOCK_FILE}  # there, at most
FORMAT = b"headrace store 4"
VALUES = b"values"  # in the table of numbers: the name of the file
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Environment:
    """An open LMDB environment with its two tables, and the file of all KV beside it."""

    path: Path
    lmdb: lmdb.Environment
    entries: "_Database"  # digest -> Entry
    info: "_Database"  # names -> what is known of the whole store
    pid: int
    tables: DataFile  # LMDB's file
    guard: Guard  # of its map
    values: Values
    values_guard: Guard  # of their map
    ways: Ways  # to them
    lock: os.stat_result  # of the file that keeps writers apart
    damage: str = ""  # of the tables: what is wrong, once that is known
    under_way: list[None] = field(default_factory=list)  # as long as there are transactions

    def check_readable(self) -> None:
        """Of a data file cut short, without a guard: make it safe to read, or raise. 2 us."""
        if not self.guard.guards:
            self.check_length()

    def check_length(self) -> None:
        """Mend the data file if somebody has cut it short since: see `mend_length`. 2 us."""
        if self.damage:
            raise CorruptRecord(self.damage)
        if self.tables.size() // self.tables.page_bytes > self.lmdb.info()["last_pgno"]:
            return
        self.check_place()
        try:
            mend_length(self.lmdb, self.path)
        except CorruptRecord as error:
            self.damage = str(error)
            raise

    def is_writable(self) -> bool:
        """Whether a change is worth a try."""
        return not self.damage and not self._lost()

    def check_place(self) -> None:
        """Raise StoreError if the folder has other files by now, or none. 9 us."""
        if lost := self._lost():
            raise StoreError(
                f"{lost} was deleted, or replaced by another, while it was open: "
                "nothing more is stored there; open the store again"
            )

    def close(self) -> None:
        self.guard.close()
        self.values_guard.close()
        self.ways.close()
        self.values.close()
        self.tables.close()
        # LMDB would wait for those of threads that a fork left behind, and end them for their owner
        if os.getpid() == self.pid or not self.under_way:
            self.lmdb.close()

    def _lost(self) -> Path | None:
        """A file that is no longer where it was."""
        files = {self.path / DATA_FILE: self.tables, self.values.path: self.values}
        if lost := next((path for path, file in files.items() if not file.is_at(path)), None):
            return lost
        try:  # without it, or with another one, nothing keeps two writers apart
            there = os.path.samestat((self.path / LOCK_FILE).stat(), self.lock)
        except OSError:
            there = False
        return None if there else self.path / LOCK_FILE


def open_environment(path: Path) -> Environment:
    """Open or create the store in the folder `path`.

    Every commit is flushed, data pages first and then the meta page (sync and metasync): what has
    been acknowledged survives a power cut. Without metasync the last batch may be lost although
    it was acknowledged.

    Raises:
        StoreFormatError: if there is something else, or another version.
        StoreError: if the folder cannot be used: a file, no permission, open in this process.
    """
    with explained(path):
        path = path.absolute()  # wherever the process goes later
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path / DATA_FILE).exists():
            _create(path)
        env = open_lmdb(path)
        guard = Guard(path / DATA_FILE)
        try:
            with guard.whole():
                return _prepare(path, env, guard)
        except BaseException:
            guard.close()
            env.close()
            raise


def open_lmdb(path: Path) -> lmdb.Environment:
    """LMDB's part of the store in a folder, made if there is none."""
    # readahead: the kernel would read 8 MiB around every page of the tables that is not cached.
    # No spare transactions, which save 0.4 us: a forked child that closes would end its parent's.
    return lmdb.open(
        os.fsencode(path), map_size=MAP_BYTES, mode=0o600, max_dbs=2,
        max_readers=1024, readahead=False,
    )  # fmt: skip


def _create(path: Path) -> None:
    """Put an empty store into the folder in one step, so that a crash leaves it or nothing."""
    with _alone(path), TemporaryDirectory(dir=path, prefix=UNFINISHED) as made:
        if (path / DATA_FILE).exists():
            return  # another process was faster
        values = new_values(path)
        sync_folder(path)  # there before it is named
        with open_lmdb(Path(made)) as env:
            with env.begin(write=True) as txn:
                env.open_db(b"entries", txn)
                info = env.open_db(b"info", txn)
                for name, value in ((b"format", FORMAT), (VALUES, values.name.encode()), empty()):
                    txn.put(name, value, db=info)
            for _ in range(2):  # a compacted store begins with its third state, as this one does
                say_again(env)
        os.rename(Path(made) / DATA_FILE, path / DATA_FILE)
    sync_folder(path)


def say_again(env: lmdb.Environment) -> None:
    """Commit once more: LMDB keeps two states, and who waited for the lock may open either.

    It knows by the lock's file which was the last one of the store before.
    """
    info = env.open_db(b"info", create=False)
    with env.begin(write=True) as txn:
        txn.put(VALUES, txn.get(VALUES, b"", db=info), db=info)


def new_values(path: Path) -> Path:
    """A new, empty values file in the folder; nobody's yet."""
    made = path / f"{PREFIX}{secrets.token_hex(8)}"
    os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    return made


def files_of(path: Path) -> list[Path]:
    """Of the store in the folder: LMDB's, and that of all KV."""
    return [path / DATA_FILE, *values_files(path)]


def values_files(path: Path) -> list[Path]:
    """Files in the folder that have names of ours; what users call `values-...` has not."""
    return [file for file in path.glob(f"{PREFIX}*") if NAME.fullmatch(file.name)]


def files_bytes(path: Path) -> int:
    """What the store in the folder takes of the disk."""
    return sum(file.stat().st_blocks for file in files_of(path)) * 512


def _clean(path: Path, values: str) -> None:
    """Delete what processes left that were killed while they created or compacted the store.

    It is open here, so that nobody compacts it, and its values are in the file of this name.
    """
    if any(path.glob(f"{UNFINISHED}*")) or len(values_files(path)) > 1:
        with _alone(path):
            for made in path.glob(f"{UNFINISHED}*"):
                if made.is_dir() and MADE.issuperset(os.listdir(made)):
                    shutil.rmtree(made)
            for other in values_files(path):
                if other.name != values:
                    other.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """In which no other process creates the store, or cleans up."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _prepare(path: Path, env: lmdb.Environment, guard: Guard) -> Environment:
    env.reader_check()  # frees the slots of readers that died
    mend_length(env, path)
    verify_after_boot(env, path)
    with ExitStack() as opened:
        values = opened.enter_context(closing(_values(path / checked_format(path, env))))
        _clean(path, values.path.name)
        books, info = (env.open_db(table, create=False) for table in (b"entries", b"info"))
        tables = opened.enter_context(closing(DataFile(path / DATA_FILE, env.stat()["psize"])))
        around = Guard(values.path, (values.map_start, values.map_end))
        opened.callback(around.close)
        mapped_at = around.start if around.guards else 0
        ways = Ways(values, mapped_at, around.end - around.start)
        lock = (path / LOCK_FILE).stat()
        opened.pop_all()
    return Environment(
        path, env, books, info, os.getpid(), tables, guard, values, around, ways, lock
    )  # fmt: skip


def _values(path: Path) -> Values:
    try:
        return Values(path)
    except FileNotFoundError as error:
        raise CorruptRecord(f"{path}, which holds all blocks, is gone; {START_ANEW}") from error


def checked_format(path: Path, env: lmdb.Environment) -> str:
    """The name of the values file. Raises StoreFormatError."""
    try:
        info = env.open_db(b"info", create=False)
        with env.begin() as txn:
            found, values = (txn.get(name, db=info) for name in (b"format", VALUES))
    except (lmdb.NotFoundError, lmdb.IncompatibleError):
        found = values = None
    if found != FORMAT:
        raise StoreFormatError(
            f"{path} holds {'no Headrace store' if found is None else repr(found)}, and this "
            f"version reads {FORMAT!r}: choose another disk_path, or {START_ANEW}"
        )
    name = "" if values is None else values.decode("ascii", "replace")
    if not NAME.fullmatch(name):
        raise CorruptRecord(f"{path} does not say where its blocks are; {START_ANEW}")
    return name
