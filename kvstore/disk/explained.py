"""Errors of LMDB and of the system, as the store's, with what to do about them."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb

from kvstore.errors import CorruptRecord, DeviceFull, StoreError

START_ANEW = "delete the folder (blocks are a cache and will be computed again)"
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TABLE_ERRORS = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError, lmdb.BadDbiError,
)  # fmt: skip
_LITTLE_BYTES = 1 << 20


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of LMDB and the system into the store's, with what to do about them."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise DeviceFull(f"LMDB map of {path} is full ({error}); lower disk_bytes") from error
    except lmdb.LockError as error:
        raise StoreError(
            f"cannot lock {path} ({error}); use a local file system, and if containers share the "
            "folder, one pid namespace for them: LMDB knows processes by their numbers"
        ) from error
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
    if code == errno.ENOMEM:
        return StoreError(
            f"no memory for {path}, or no room in this process's addresses, of which a store takes "
            "1 TiB and uses little: lift their limit (ulimit -v)"
        )
    if "already open" in str(error):
        return StoreError(
            f"{path} is open in this process: share that TieredStore, or close it; one that was in "
            "use when this process was forked stays open"
        )
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
