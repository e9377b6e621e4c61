"""Folders: where files live that only save time, and when names in one last."""

import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/headrace`, by default `~/.cache/headrace`; may not exist yet.

    PermissionError for a user without a home whose folder of temporary files another one made.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "headrace"
    try:
        return Path.home() / ".cache" / "headrace"
    except RuntimeError:  # a user without a home, as in some containers
        return _own(Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}")


def _own(folder: Path) -> Path:
    """`folder`, made if it is not there; nobody else may put files there: code is run from it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}: set XDG_CACHE_HOME")
    return folder


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder, as they are now, outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
