"""Folders: where files live that only save time, and when names in one last."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/headrace`, by default `~/.cache/headrace`; may not exist yet."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "headrace"
    try:
        return Path.home() / ".cache" / "headrace"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder, as they are now, outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
