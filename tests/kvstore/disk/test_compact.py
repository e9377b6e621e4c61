"""A store grows no further than what it held, and can be made smaller when nobody has it open."""

import errno
import fcntl
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import lmdb
import pytest

from kvstore.codecs.known import RAW
from kvstore.disk import compact as module
from kvstore.disk.compact import compact
from kvstore.disk.environment import UNFINISHED, files_bytes
from kvstore.disk.packed import entry_cost
from kvstore.disk.space import Space
from kvstore.disk.tier import DiskTier
from kvstore.errors import DeviceFull, StoreError, StoreFormatError
from kvstore.store import TieredStore
from tests.kvstore.crash import forked
from tests.kvstore.disk.test_readers import reading
from tests.kvstore.make import chain, content, identity, items, right
from tests.kvstore.stored import entry_of, flip, values_file

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)


def opened(path):
    return DiskTier(path, 1 << 30)


def keys(number, size=4):
    return chain(range(1000 * number, 1000 * number + 8 * size), model=MODEL, size=size)


@pytest.fixture(scope="module")
def emptied(tmp_path_factory):
    """A store that held ten times as much as it does."""
    path = tmp_path_factory.mktemp("emptied") / "store"
    with TieredStore([DiskTier(path, 1 << 30)]) as store:
        for number in (1, 2, 3, 0, 4, 5, 6, 7, 8, 9):  # what stays is in the midst of the files
            store.put(items(keys(number), MODEL))
        store.flush()
        for number in range(1, 10):
            store.delete(keys(number))
    return path


@pytest.fixture
def path(emptied, tmp_path):
    """A copy of it, with its holes."""
    subprocess.run(["cp", "-r", "--sparse=always", emptied, tmp_path / "store"], check=True)
    return tmp_path / "store"


def files(path):
    """What is in them, by the first letters of their names: that of the values changes."""
    return {f.name[:7]: f.read_bytes() for f in path.iterdir() if f.name != "lock.mdb"}


def names(path):
    return sorted(name[:7] for name in os.listdir(path))


NAMES = ["data.md", "lock.md", "values-", "verifie"]


def check_whole(path):
    """All blocks are there, sound, and the store works."""
    with TieredStore([opened(path)]) as store:
        tier = store._levels[0].tier
        assert store.audit().clean
        assert all(right(tier.get(key), key, MODEL) for key in keys(0))
        store.put(items(keys(1), MODEL))
        store.flush()
        assert store.lookup(keys(0)) == store.lookup(keys(1)) == 8
        assert store.audit().clean
        assert tier.corrupt == 0
    assert names(path) == NAMES


@pytest.mark.parametrize("at_once", [1000, module._AT_ONCE])
def test_compacting_keeps_every_block_and_no_other_page(path, monkeypatch, at_once):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    sizes = {name: len(data) for name, data in files(path).items()}
    before, after = compact(path)
    assert after == files_bytes(path) <= before  # which has holes where blocks were deleted
    assert names(path) == NAMES
    now = {name: len(data) for name, data in files(path).items()}
    assert now["data.md"] < sizes["data.md"]
    assert sum(now.values()) < sum(sizes.values()) / 4
    tier = opened(path)
    pages = [entry_of(tier, key).extent for key in keys(0)]
    assert now["values-"] == 4096 * sum(extent.pages for extent in pages)
    tier.close()
    assert (values_file(path).stat().st_mode & 0o777) == 0o600
    check_whole(path)


def test_compacting_twice_changes_nothing(path):
    compact(path)
    before = files(path)["values-"]
    assert compact(path)[0] == compact(path)[1]
    assert files(path)["values-"] == before
    check_whole(path)


def test_an_empty_store_is_compacted(tmp_path):
    opened(tmp_path / "store").close()
    compact(tmp_path / "store")
    assert files(tmp_path / "store")["values-"] == b""
    with TieredStore([opened(tmp_path / "store")]) as store:
        assert store.audit().clean


@pytest.mark.parametrize("damage", ["a record", "an entry", "the end"])
def test_what_is_damaged_stays_so_and_costs_no_other_block(path, damage):
    tier = opened(path)
    last = keys(0)[-1]
    lies_last = max(keys(0), key=lambda key: entry_of(tier, key).page)
    if damage == "a record":
        flip(tier, last)
    elif damage == "an entry":
        with tier.access.changing() as txn:
            stored = bytes(txn.get(last.digest, db=tier.access.ledger.env.entries))
            changed = stored[:-1] + bytes([stored[-1] ^ 1])
            txn.put(last.digest, changed, db=tier.access.ledger.env.entries)
    else:
        last = lies_last
        os.truncate(values_file(path), 4096 * entry_of(tier, last).page + 5000)
    tier.close()
    compact(path)
    with TieredStore([opened(path)]) as store:
        assert [store.get(key) is not None for key in keys(0)] == [k != last for k in keys(0)]
        assert not store.audit(repair=True).clean
        assert store.audit().clean


@pytest.mark.parametrize("found", [b"headrace store 3", None])
def test_a_store_of_another_format_is_not_compacted(path, found):
    with lmdb.open(str(path), max_dbs=3, map_size=1 << 30) as env:
        info = env.open_db(b"info", create=False)
        with env.begin(write=True, db=info) as txn:
            txn.put(b"format", found) if found else txn.delete(b"format")
    before = files(path)
    with pytest.raises(StoreFormatError, match="delete the folder"):
        compact(path)
    assert files(path) == before
    assert names(path) == NAMES


def test_a_store_without_its_values_is_not_compacted(path):
    values_file(path).unlink()
    before = files(path)
    with pytest.raises(StoreError, match="No such file"):
        compact(path)
    assert files(path) == before


def lock_alone(path):
    with (path / "lock.mdb").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)


def test_a_store_that_is_open_is_not_compacted(path):
    with TieredStore([DiskTier(path, 1 << 30)]):
        with pytest.raises(StoreError, match="open in this"):
            compact(path)
        pid = forked(lock_alone, path)  # nor by another process, after that
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    pid = reading(path)
    try:
        with pytest.raises(StoreError, match="open in another process"):
            compact(path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert compact(path)


STEPS = [
    (module, "verify_file"), (module, "checked_format"), (module, "new_values"),
    (module, "_copy_values"), (module, "_copy"), (os, "fsync"), (Space, "settle"),
    (module, "sync_folder"), (os, "replace"),
]  # fmt: skip


def stop(monkeypatch, where, name, how, after=0):
    """Let a step of a compaction fail, the first time or later."""
    step, left = getattr(where, name), [after]

    def stopped(*args, **kwargs):
        left[0] -= 1
        return how() if left[0] < 0 else step(*args, **kwargs)

    monkeypatch.setattr(where, name, stopped)


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt():
    raise KeyboardInterrupt


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("where", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("how", [fail, interrupt])
def test_a_compaction_that_fails_leaves_the_store_as_it_was(path, monkeypatch, where, name, how):
    before = files(path)
    stop(monkeypatch, where, name, how, after=3 if name == "_copy" else 0)
    with pytest.raises(DeviceFull if how is fail else KeyboardInterrupt):
        compact(path)
    monkeypatch.undo()
    assert names(path) == NAMES
    assert files(path) == before
    check_whole(path)
    compact(path)
    check_whole(path)


def test_a_copy_is_whole_on_disk_before_it_is_the_store(path, monkeypatch):
    steps = []

    def noted(name, step):
        return lambda *args: (steps.append(name), step(*args))[1]

    for where, name in ((os, "fsync"), (module, "sync_folder"), (os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(where, name, noted(name, getattr(where, name)))
    compact(path)
    folder = ["sync_folder", "fsync"]
    assert steps == ["fsync", *folder, "replace", *folder, "unlink"]


KILLED = [*STEPS[2:], (module, "files_bytes"), (Path, "unlink")]


@pytest.mark.parametrize(("where", "name"), KILLED, ids=[name for _, name in KILLED])
def test_a_compaction_that_is_killed_leaves_one_whole_store_and_its_files_go_when_opened_next(
    path, monkeypatch, where, name
):
    stop(monkeypatch, where, name, die, after=int(name in ("_copy", "files_bytes", "sync_folder")))
    pid = forked(compact, path)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    assert name in ("new_values", "files_bytes") or names(path) != NAMES
    check_whole(path)


def test_what_a_killed_process_was_creating_goes_when_the_store_is_opened_next(
    tmp_path, monkeypatch
):
    path = tmp_path / "store"
    stop(monkeypatch, os, "rename", die)
    pid = forked(opened, path)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    assert [name[:5] for name in names(path)] == [".head", "value"]
    opened(path).close()
    assert names(path) == NAMES


def test_files_of_no_store_go_and_those_of_a_store_that_others_have_open_stay(path):
    used = values_file(path)
    pid = reading(path)
    try:
        (path / "values-0123456789abcdef").write_bytes(b"of a killed compaction")
        (path / f"{UNFINISHED}0").mkdir()
        check_whole(path)
        assert values_file(path) == used
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_files_of_others_in_the_folder_of_a_store_stay(path):
    users = [
        "new-site/index.html",
        "values-prod.yaml",
        "values-2026",
        "values-0123456789abcdef.bak",
    ]
    users += ["new-notes", f"{UNFINISHED}site/data.mdb", f"{UNFINISHED}site/mine", f"{UNFINISHED}x"]
    for name in users:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("precious")
    size = files_bytes(path)
    opened(path).close()
    compact(path)
    assert files_bytes(path) < size
    with TieredStore([opened(path)]) as store:
        assert store.lookup(keys(0)) == 8
    assert {name: (path / name).read_text() for name in users} == dict.fromkeys(users, "precious")


def test_folders_in_anothers_folder_stay(tmp_path):
    (tmp_path / "new-year").mkdir()
    (tmp_path / "values-of-mine").touch()
    (tmp_path / "values-0123456789abcdef").touch()
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as txn:
        txn.put(b"mine", b"precious")
    with pytest.raises(StoreFormatError):
        opened(tmp_path)
    mine = {"new-year", "values-of-mine", "values-0123456789abcdef"}
    assert mine < set(os.listdir(tmp_path))


def wait_until_locked_out(pid):
    """Return when that process waits for a lock."""
    waits = re.compile(rf"-> POSIX +ADVISORY +\w+ {pid} ")
    while not waits.search(Path("/proc/locks").read_text()):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it did not wait"
        time.sleep(0.01)


@pytest.mark.parametrize("commits", range(2))
def test_who_opens_the_store_meanwhile_waits_and_finds_it_whole(path, monkeypatch, commits):
    with TieredStore([opened(path)]) as store:
        for number in range(1, 1 + commits):  # LMDB keeps the last state in one of two places
            store.put(items(keys(number), MODEL))
            store.flush()
    waiting, copy_values = [], module._copy_values

    def copied(*args):
        waiting.append(forked(check_whole, path))
        wait_until_locked_out(*waiting)
        copy_values(*args)

    monkeypatch.setattr(module, "_copy_values", copied)
    compact(path)
    assert os.waitpid(waiting[0], 0)[1] == 0


def put_some(path):
    """As check_whole, where nothing was."""
    with TieredStore([opened(path)]) as store:
        store.put(items(keys(1), MODEL))
        store.flush()


@pytest.mark.parametrize("lock", ["its own", "none: it was copied"])
def test_what_is_put_into_an_empty_store_after_waiting_for_it_is_there(tmp_path, monkeypatch, lock):
    path, waiting, say_again = tmp_path / "store", [], module.say_again
    opened(path).close()
    if lock != "its own":
        (path / "lock.mdb").unlink()

    def said(env):
        say_again(env)
        waiting.append(forked(put_some, path))
        wait_until_locked_out(*waiting)

    monkeypatch.setattr(module, "say_again", said)
    compact(path)
    assert os.waitpid(waiting[0], 0)[1] == 0
    with TieredStore([opened(path)]) as store:
        assert store.lookup(keys(1)) == 8
        assert store.audit().clean


def test_damaged_tables_are_not_compacted(path):
    data = bytearray((path / "data.mdb").read_bytes())
    data[8 * 4096 :] = bytes(len(data) - 8 * 4096)
    (path / "data.mdb").write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        compact(path)
    assert (path / "data.mdb").read_bytes() == data


def churned(path, sizes, room, batch, times):
    """Put blocks of these sizes, so many times what there is room for; both files over room."""
    dice, put = random.Random(1), 0
    with TieredStore([DiskTier(path, room)]) as store:
        for number in range(1 << 30):
            some = keys(number, dice.choice(sizes))[:batch]
            store.put(items(some, MODEL))
            store.flush()
            put += sum(cost(key.num_tokens) for key in some)
            if put > times * room:
                break
        assert store.stats().tiers["disk"].used_bytes > 0.9 * room
        assert store.audit().clean
    return files_bytes(path) / room


def cost(size):
    return entry_cost(content(keys(0, size)[0], MODEL), RAW)


def test_under_churn_the_file_grows_to_what_it_holds_and_three_batches_more(tmp_path):
    room = 300 * cost(16)
    assert churned(tmp_path / "store", [16], room, batch=2, times=2) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[16], [4, 16, 64], [64, 60, 56, 52]], ids=str)
def test_under_long_churn_of_any_sizes_the_file_grows_by_five_percent(tmp_path, sizes):
    assert churned(tmp_path / "store", sizes, 1600 * max(map(cost, sizes)), 8, times=8) <= 1.05
