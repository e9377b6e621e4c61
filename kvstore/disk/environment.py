"""Opening an LMDB folder: whose it is, which format, and errors that say what to do."""

import errno
import fcntl
import logging
import os
import resource
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import lmdb
from lmdb.verify import VerifyError, verify

from kvstore.disk.extent import MAP_BYTES, DataFile
from kvstore.disk.guard import Guard
from kvstore.disk.space import empty
from kvstore.disk.values import NAME, PREFIX, Values
from kvstore.disk.ways import Ways
from kvstore.errors import CorruptRecord, DeviceFull, StoreError, StoreFormatError
from native.folders import sync_folder

if TYPE_CHECKING:
    from lmdb import _Database

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DATA_FILE = "data.mdb"
UNFINISHED = ".headrace-unfinished-"  # prefix of folders in which a data file is made
MADE = {DATA_FILE, "lock.mdb"}  # there, at most
FORMAT = b"headrace store 4"
VALUES = b"values"  # in the table of numbers: the name of the file
START_ANEW = "delete the folder (blocks are a cache and will be computed again)"
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TABLE_ERRORS = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError, lmdb.BadDbiError,
)  # fmt: skip
_LITTLE_BYTES = 1 << 20
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
    damage: str = ""  # of the tables: what is wrong, once that is known

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
        """Raise StoreError if the folder has other files by now, or none. 6 us."""
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
        self.lmdb.close()

    def _lost(self) -> Path | None:
        """A file that is no longer where it was."""
        files = {self.path / DATA_FILE: self.tables, self.values.path: self.values}
        return next((path for path, file in files.items() if not file.is_at(path)), None)


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
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path / DATA_FILE).exists():
            _create(path)
        env = _open(path)
        guard = Guard(path / DATA_FILE)
        try:
            with guard.whole():
                return _prepare(path, env, guard)
        except BaseException:
            guard.close()
            env.close()
            raise


def _open(path: Path) -> lmdb.Environment:
    # readahead: the kernel would read 8 MiB around every page of the tables that is not cached
    return lmdb.open(
        str(path), map_size=MAP_BYTES, mode=0o600, max_dbs=2,
        max_readers=1024, max_spare_txns=16, readahead=False,
    )  # fmt: skip


def _create(path: Path) -> None:
    """Put an empty store into the folder in one step, so that a crash leaves it or nothing."""
    with _alone(path), TemporaryDirectory(dir=path, prefix=UNFINISHED) as made:
        if (path / DATA_FILE).exists():
            return  # another process was faster
        values = new_values(path)
        sync_folder(path)  # there before it is named
        with _open(Path(made)) as env, env.begin(write=True) as txn:
            env.open_db(b"entries", txn)
            info = env.open_db(b"info", txn)
            for name, value in ((b"format", FORMAT), (VALUES, values.name.encode()), empty()):
                txn.put(name, value, db=info)
        os.link(Path(made) / DATA_FILE, path / DATA_FILE)
    sync_folder(path)


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
    _verify_after_boot(env, path)
    values = _values(path / checked_format(path, env))
    _clean(path, values.path.name)
    books, info = (env.open_db(table, create=False) for table in (b"entries", b"info"))
    tables = DataFile(path / DATA_FILE, env.stat()["psize"])
    around = Guard(values.path, (values.map_start, values.map_end))
    mapped_at = around.start if around.guards else 0
    ways = Ways(values, mapped_at, around.end - around.start)
    return Environment(path, env, books, info, os.getpid(), tables, guard, values, around, ways)


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


def _verify_after_boot(env: lmdb.Environment, path: Path) -> None:
    """Check the tables once after each start of the machine, before LMDB walks them.

    LMDB keeps its tables whole over a crash if the disk does not lie about flushes. Disks do, and
    LMDB would follow a damaged page into a segmentation fault. A killed process cannot do
    that damage: what it wrote is in the page cache.
    """
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    seen = path / "verified"
    if boot and seen.exists() and seen.read_bytes() == boot.encode():
        return
    with env.begin(write=True):  # excludes writers; touches no page but the meta pages
        verify_file(path)
    handle = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(boot)


def verify_file(path: Path) -> None:
    """Raise CorruptRecord if LMDB's tables are damaged. Takes about 25 us per record."""
    try:
        problems = verify(str(path))
    except VerifyError as error:
        problems = [str(error)]
    if problems:
        raise CorruptRecord(f"the tables in {path} are damaged ({problems[0]}); {START_ANEW}")


def mend_length(env: lmdb.Environment, path: Path) -> None:
    """Make the data file as long as its meta page says, if nothing was behind its end.

    LMDB leaves a file a little short if the last pages were freed before they were ever written.
    A file that was cut is left as it is: what lies behind its end must not be taken for zeros,
    on which LMDB's assertions end the process.

    Raises:
        CorruptRecord: it was cut.
    """
    file = path / DATA_FILE
    if file.stat().st_size >= _full_bytes(env):
        return
    with env.begin(write=True):  # excludes writers, who lengthen the file themselves
        end = _full_bytes(env)
        if file.stat().st_size < end:
            verify_file(path)
            os.truncate(file, end)


def _full_bytes(env: lmdb.Environment) -> int:
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of LMDB and the system into the store's, with what to do about them."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise DeviceFull(f"LMDB map of {path} is full ({error}); lower disk_bytes") from error
    except lmdb.LockError as error:
        raise StoreError(f"cannot lock {path} ({error}); use a local file system") from error
    except lmdb.PanicError as error:
        raise CorruptRecord(
            f"an earlier write to {path} failed in its last step ({error}); what was stored before "
            "is intact: open the store again"
        ) from error
    except _TABLE_ERRORS as error:
        raise CorruptRecord(f"the tables in {path} are damaged ({error}); {START_ANEW}") from error
    except (lmdb.Error, OSError) as error:
        raise _explain(path, error) from error


def _explain(path: Path, error: lmdb.Error | OSError) -> StoreError:
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", None)
    if code in _SPACE_ERRORS or (code == errno.EIO and _is_full(path)):
        return DeviceFull(
            f"no space left for {path} ({error}); free some, or lower disk_bytes. What was stored "
            "before is intact"
        )
    if code in (errno.EEXIST, errno.ENOTDIR):
        return StoreError(f"disk_path must be a folder, but {path} is or lies in a file")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"no permission to read and write {path} ({error}); change disk_path")
    if "already open" in str(error):
        return StoreError(f"{path} is open in this process: share that TieredStore, or close it")
    return StoreError(f"cannot use the store in {path}: {error}")


def _is_full(path: Path) -> bool:
    """Whether the file system, or the limit of a file's size, leaves no room for a write.

    The system then writes a part, for which LMDB's name is "Input/output error".
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with suppress(OSError):
        space, size = os.statvfs(path), max(file.stat().st_size for file in path.iterdir())
        free = space.f_bavail * space.f_frsize
        return free < _LITTLE_BYTES or resource.RLIM_INFINITY != limit < size + _LITTLE_BYTES
    return False
