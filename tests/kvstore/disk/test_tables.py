"""Damage in LMDB's own pages is found by a process of its own, whatever becomes of that."""

import os
import subprocess

import pytest

from kvstore.disk import tables
from kvstore.disk.tables import check_tables
from kvstore.disk.tier import DiskTier
from kvstore.errors import CorruptRecord
from tests.kvstore.make import chain, items
from tests.kvstore.stored import values_file


@pytest.fixture
def path(tmp_path):
    tier = DiskTier(tmp_path / "store", 1 << 30)
    tier.put(items(chain(range(400))))
    tier.close()
    return tmp_path / "store"


def damage(file, page):
    with file.open("r+b") as file:
        file.seek(page * 4096)
        file.write(os.urandom(4096))


def test_sound_tables_pass_while_others_use_them_and_whatever_lies_around(
    path, tmp_path, monkeypatch
):
    (tmp_path / "kvstore").mkdir()
    (tmp_path / "kvstore" / "__init__.py").touch()  # a package of the user's, by chance
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    tier = DiskTier(path, 1 << 30)
    check_tables(path)
    tier.close()


def test_damaged_pages_are_named(path):
    for page in range(2, (path / "data.mdb").stat().st_size // 4096):  # some of them in use
        damage(path / "data.mdb", page)
    with pytest.raises(CorruptRecord, match=r"damaged.*delete the folder"):
        check_tables(path)


def test_damaged_kv_is_not_damage_of_the_tables(path):
    damage(values_file(path), 5)
    check_tables(path)


def test_a_store_without_its_kv_is_named(path):
    values_file(path).unlink()
    with pytest.raises(CorruptRecord, match=r"is gone.*delete the folder"):
        check_tables(path)


def test_a_walk_that_ends_its_process_is_a_clear_error(path, monkeypatch):
    killed = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(tables.subprocess, "run", lambda *_args, **_kwargs: killed)
    with pytest.raises(CorruptRecord, match="SIGSEGV on reading"):
        check_tables(path)
