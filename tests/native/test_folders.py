"""A file that takes another one's place is there after a power cut: its folder was synced since.
And a cache is the user's own."""

import os
import tempfile
from pathlib import Path

import pytest

from engine.rag.catalogue import Catalogue, Document, Origin
from kvstore.disk.compact import compact
from kvstore.disk.tier import DiskTier
from native.folders import cache_folder, sync_folder


@pytest.fixture
def synced(monkeypatch):
    """The folders that were synced, and the files that were in each by then."""
    seen, sync = {}, os.fsync

    def noted(handle):
        folder = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(folder):
            seen[folder] = {entry.name: entry.inode() for entry in os.scandir(folder)}
        sync(handle)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("which file is synced is not told here")
    monkeypatch.setattr(os, "fsync", noted)
    return seen


def test_a_folder_is_synced(tmp_path, synced):
    sync_folder(tmp_path)
    assert set(synced) == {str(tmp_path)}


def test_a_store_is_synced_when_it_is_made_and_when_it_is_compacted(tmp_path, synced):
    path = tmp_path / "store"
    for change in (lambda: DiskTier(path, 1 << 30).close(), lambda: compact(path)):
        synced.clear()
        change()
        assert synced[str(path)]["data.mdb"] == (path / "data.mdb").stat().st_ino


def test_a_catalogue_is_synced_when_it_is_written_anew(tmp_path, synced):
    path = tmp_path / "rag.jsonl"
    Catalogue(path).add([Document("one", "title", ())], Origin((1, 2), 64))
    assert synced[str(tmp_path)][path.name] == path.stat().st_ino


def test_a_cache_without_a_home_is_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder
    folder.chmod(0o777)  # as another user would leave it, who was there first
    with pytest.raises(PermissionError, match="XDG_CACHE_HOME"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(PermissionError, match="XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "headrace-12345").mkdir(mode=0o755)  # not of this user
    with pytest.raises(PermissionError, match="XDG_CACHE_HOME"):
        cache_folder()
