"""Whether LMDB's tables are whole: it carries no checksum, and follows a damaged page anywhere."""

import os
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from kvstore.disk.explained import START_ANEW
from kvstore.errors import CorruptRecord

DATA_FILE = "data.mdb"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def verify_after_boot(env: lmdb.Environment, path: Path) -> None:
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
