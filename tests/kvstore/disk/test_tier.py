"""The disk tier and the folder it lives in."""

import errno
import os
import resource
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import lmdb
import pytest

from kvstore.config import StoreConfig
from kvstore.disk.audit import audit_disk
from kvstore.disk.compact import compact
from kvstore.disk.explained import explained
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.errors import DeviceFull, MissingParent, StoreError, StoreFormatError, TierFull
from kvstore.store import TieredStore
from tests.kvstore.make import chain, content, identity, items, right
from tests.kvstore.stored import values_file

KEYS = chain(range(40))
COST = entry_cost(content(KEYS[0], identity()))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def tier(path):
    tier = DiskTier(path, 10 * COST)
    yield tier
    tier.close()


def test_the_folder_and_its_files_are_private(tier, path):
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_put_is_all_or_nothing(tier):
    tier.put(items(KEYS[:8]))
    other = items(chain(range(100, 116)))
    with pytest.raises(TierFull, match="raise disk_bytes"):
        tier.put(other, victims=[KEYS[7].digest, KEYS[0].digest])  # 0 has a child: it must stay
    assert tier.held(KEYS) == [True] * 8 + [False] * 2
    assert tier.used_bytes == 8 * COST
    with pytest.raises(MissingParent):
        tier.put([other[0], other[2]])
    assert other[0][0] not in tier


def test_uses_keep_their_order_over_a_clock_that_is_set_back(tier, path, monkeypatch):
    alone = [chain(range(1000 * i, 1000 * i + 4))[0] for i in range(4)]
    now = time.time_ns()
    for hours, key in zip((0, 30, -50, -90), alone, strict=True):  # two of them "before" the first
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: now + hours * 3600 * 10**9)
        tier.put(items([key]))
    tier.touched([alone[1].digest, alone[0].digest])
    tier.close()
    with closing(DiskTier(path, 10 * COST)) as again:
        used = [resident.digest for resident in again.residents()]
    assert used == [alone[i].digest for i in (2, 3, 1, 0)]


def test_pages_that_fit_no_block_are_given_back_to_the_file_system(path):
    """Small blocks leave holes between them, and large ones make the file grow."""
    model = identity(num_kv_heads=8, head_dim=64)
    keys = [
        [chain(range(n, n + 4), model=model, size=size)[0] for n in range(64)] for size in (1, 4)
    ]
    small, large = (items(some, model) for some in keys)
    capacity = sum(entry_cost(block.data) for _, block in small)
    with closing(DiskTier(path, capacity)) as tier:
        tier.put(small)
        tier.delete([key for key, _ in small[::2]])
        put = []
        for item in large:
            if tier.used_bytes + entry_cost(item[1].data) > capacity:
                break
            tier.put([item])
            put.append(item)
        values = tier.access.ledger.env.values
        assert values.size() > 1.2 * capacity
        assert values.disk_bytes < 1.1 * capacity
        assert all(right(tier.get(key), key, model) for key, _ in [*small[1::2], *put])
        assert audit_disk(tier, repair=False).clean


def test_only_as_many_victims_go_as_are_needed(tier):
    tier.put(items(KEYS))
    victims = [key.digest for key in reversed(KEYS)]
    gone = tier.put(items(chain(range(100, 108))), victims)
    assert gone == victims[:2]
    assert tier.held(KEYS) == [True] * 8 + [False] * 2
    assert tier.put(items(KEYS[:1]), victims) == []


def test_deleting_a_block_deletes_what_rests_on_it(tier):
    branch = chain([*range(8), 99, 99, 99, 99])
    tier.put(items(KEYS[:5]) + items(branch))
    tier.delete([KEYS[3], b"?" * 32])
    assert tier.held(KEYS[:5]) == [True] * 3 + [False] * 2
    tier.delete([KEYS[1].digest])
    assert tier.held(KEYS[:1] + branch[1:]) == [True, False, False]
    assert tier.used_bytes == COST
    tier.put(items(KEYS[1:4]))
    tier.delete([KEYS[0]])
    assert tier.used_bytes == 0


def test_another_format_version_is_refused_with_what_to_do(tier, path):
    tier.close()
    for stored in (b"headrace store 0", None):
        with lmdb.open(str(path), max_dbs=3, map_size=1 << 30) as env:
            info = env.open_db(b"info")
            with env.begin(write=True, db=info) as txn:
                txn.put(b"format", stored) if stored else txn.delete(b"format")
        with pytest.raises(StoreFormatError, match="choose another disk_path, or delete"):
            DiskTier(path, COST)


def test_a_folder_with_another_lmdb_database_is_left_alone(path):
    path.mkdir()
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        txn.put(b"mine", b"precious")
    with pytest.raises(StoreFormatError, match="no Headrace store"):
        DiskTier(path, COST)
    with lmdb.open(str(path)) as env, env.begin() as txn:
        assert txn.stat()["entries"] == 1
        assert txn.get(b"mine") == b"precious"


@pytest.mark.parametrize("junk", [b"x" * 100, b"x" * 100_000])
def test_a_folder_with_a_damaged_data_file_is_a_clear_error(path, junk):
    path.mkdir()
    (path / "data.mdb").write_bytes(junk)
    with pytest.raises(StoreError, match="cannot use the store in"):
        DiskTier(path, COST)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_path_that_is_a_file_is_a_clear_error(path, below):
    path.write_text("")
    with pytest.raises(StoreError, match="disk_path must be a folder"):
        TieredStore.open(StoreConfig(disk_path=str(path / below)))


@pytest.mark.parametrize("name", [b"st\xc3\xa9 re", b"st\xff\xa0re"])
def test_a_folder_may_have_any_name_and_stays_wherever_the_process_goes(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    with TieredStore([DiskTier(path, 10 * COST)]) as store:
        assert store._levels[0].tier.access.env.guard.guards
        monkeypatch.chdir("/")
        store.put(items(KEYS[:2]))
        store.flush()
        assert store.delete(KEYS[1:2]) == 1
        assert store.audit().clean
    monkeypatch.chdir(tmp_path)
    compact(path)
    with TieredStore([DiskTier(path, 10 * COST)]) as store:
        assert right(store.get(KEYS[0]), KEYS[0])


def test_a_file_system_needs_no_hard_links(path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with closing(DiskTier(path, COST)) as tier:
        tier.put(items(KEYS[:1]))
        assert right(tier.get(KEYS[0]), KEYS[0])


def test_a_folder_is_opened_once_in_a_process(tier, path):
    with pytest.raises(StoreError, match="open in this process"):
        DiskTier(path, COST)


def test_a_forked_child_must_open_its_own(tier, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(StoreError, match="open it in the child"):
        tier.get(KEYS[0])
    monkeypatch.undo()


def test_a_folder_without_permission_is_a_clear_error(path):
    if os.geteuid() == 0:
        error = PermissionError(errno.EACCES, "Permission denied")
        with pytest.raises(StoreError, match="no permission"), explained(path):
            raise error
        return
    path.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="no permission"):
        DiskTier(path, COST)


@contextmanager
def largest_file(nbytes):
    """Writes beyond `nbytes` of a file fail with EFBIG, as on a full device with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_device_is_a_clear_error_and_loses_nothing(path):
    with TieredStore([DiskTier(path, 1 << 30)]) as store:
        store.put(items(KEYS[:4]))
        store.flush()
        with largest_file(values_file(path).stat().st_size):
            store.put(items(chain(range(100, 500))))
            with pytest.raises(DeviceFull, match="lower disk_bytes"):
                store.flush()
            assert store.lookup(chain(range(100, 500))) == 0
            assert store.lookup(KEYS) == 4
            assert all(right(store.get(key), key) for key in KEYS[:4])
            assert store.audit().clean
        store.put(items(chain(range(100, 500))))
        store.flush()
        assert store.lookup(chain(range(100, 500))) == 100
        assert store.audit().clean


def failure(code):
    error = lmdb.Error("mdb_txn_commit")
    error.code = code
    return error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_a_full_device_name_the_setting(path, code):
    with pytest.raises(DeviceFull, match="lower disk_bytes"), explained(path):
        raise failure(code)
    with pytest.raises(DeviceFull), explained(path):
        raise lmdb.MapFullError("mdb_put")


def test_too_few_addresses_are_a_clear_error(path):
    with pytest.raises(StoreError, match="ulimit -v"), explained(path):
        raise failure(errno.ENOMEM)


@pytest.mark.parametrize("cause", ["file system", "limit"])
def test_an_io_error_of_a_write_cut_short_is_a_full_device(tier, path, monkeypatch, cause):
    size = max(file.stat().st_size for file in path.iterdir())
    if cause == "file system":
        full = SimpleNamespace(f_bavail=3, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda _: full)
    limit = resource.RLIM_INFINITY if cause == "file system" else size + 4096
    with largest_file(limit), pytest.raises(DeviceFull, match="lower disk_bytes"), explained(path):
        raise failure(errno.EIO)


def test_an_io_error_is_a_store_error(path):
    with pytest.raises(StoreError, match="cannot use"), explained(path):
        raise failure(errno.EIO)


@pytest.mark.parametrize("which", ["tables", "values"])
@pytest.mark.parametrize("keep", [0, 0.2, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_misses_or_a_clear_error_and_not_a_crash(path, keep, which):
    with TieredStore([DiskTier(path, 1 << 30)]) as store:
        store.put(items(KEYS))
        store.flush()
        file = path / "data.mdb" if which == "tables" else values_file(path)
        os.truncate(file, int(file.stat().st_size * keep))
        found = [store.get(key) for key in KEYS]
        assert all(block is None or right(block, key) for block, key in zip(found, KEYS))
        assert None in found or keep > (0.5 if which == "tables" else 0.9)
        with suppress(StoreError):
            store.close()
    with suppress(StoreError), TieredStore([DiskTier(path, 1 << 30)]) as store:
        found = [store.get(key) for key in KEYS]
        assert all(block is None or right(block, key) for block, key in zip(found, KEYS))


def test_damaged_tables_are_seen_before_they_are_walked_after_a_reboot(path):
    with TieredStore([DiskTier(path, 1 << 30)]) as store:
        store.put(items(KEYS))
    with (path / "data.mdb").open("r+b") as file:
        pages = file.seek(0, os.SEEK_END) // 4096
        for page in range(2, pages):
            file.seek(page * 4096)
            file.write(os.urandom(16))  # page headers
    (path / "verified").write_text("another boot")
    with pytest.raises(StoreError, match=r"damaged .*; delete the folder"):
        DiskTier(path, 1 << 30)


PEER = """
import sys
from pathlib import Path
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from tests.kvstore.make import chain, items, right
path, budget = Path(sys.argv[1]), int(sys.argv[2])
with TieredStore([DiskTier(path, budget)]) as store:
    for line in sys.stdin:
        start, end = map(int, line.split())
        store.put(items(chain(range(start, end))))
        store.flush()
        keys = chain(range(start, end))
        found = store.lookup(keys)
        assert all(right(store.get(key), key) for key in keys[:found])
        print(found, flush=True)
"""


@pytest.fixture
def peer(path):
    """Another process with the same store; call it to put a chain there."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, str(path), str(10 * COST)],
        env=os.environ | {"PYTHONPATH": "."}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip

    def put(start, end):
        process.stdin.write(f"{start} {end}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield put
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


def test_two_processes_see_each_others_blocks_and_share_one_budget(path, peer):
    with TieredStore([DiskTier(path, 10 * COST)]) as store:
        store.put(items(KEYS[:4]))
        store.flush()
        assert peer(0, 24) == 6  # builds on ours
        assert store.lookup(KEYS) == 6
        assert all(right(store.get(key), key) for key in KEYS[:6])
        assert store.stats().tiers["disk"].used_bytes == 6 * COST
        # ours are in its way, and those that it put on ours are in our way
        assert peer(100, 140) == 10
        assert store.lookup(KEYS) == 0
        store.put(items(KEYS))
        store.flush()
        assert store.lookup(KEYS) == 10
        assert store.lookup(chain(range(100, 140))) == 0
        assert store.audit().clean
        assert store.stats().tiers["disk"].used_bytes == 10 * COST
        # a child that only the other process knows keeps its parent
        assert peer(0, 40) == 10
        assert peer(200, 204) == 1
        store.put(items(chain(range(300, 304))))
        store.flush()
        report = store.audit()
        assert report.clean, report.problems


def test_a_chain_of_two_damaged_entries_is_stored_again_and_no_other_waits(tier):
    other = chain(range(500, 508))
    tier.put(items(KEYS[:6]))
    with tier.access.changing() as txn:
        for key in KEYS[2:4]:
            stored = bytearray(txn.get(key.digest, db=tier.access.env.entries))
            stored[50] ^= 1
            txn.put(key.digest, bytes(stored), db=tier.access.env.entries)
    assert tier.held(KEYS[:6]) == [True, True, False, False, False, False]
    tier.put(items(KEYS[:6]) + items(other))
    assert tier.held(KEYS[:6] + other) == [True] * 8
    assert all(right(tier.get(key), key) for key in KEYS[:6] + other)
    assert tier.used_bytes == 8 * COST  # a damaged entry does not say what it took


def test_what_a_tier_changes_itself_or_not_is_no_news(tier):
    tier.put(items(KEYS[:4]))
    tier.news()
    with tier.access.changing():
        pass  # LMDB commits nothing then
    tier.put(items(KEYS[4:6]))
    assert not tier.news()
