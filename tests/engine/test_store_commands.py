"""`headrace store`: what it says of a folder and of a server, and files that go elsewhere."""

import json
import os
import shutil

import pytest

from engine.cli import main
from engine.commands import store_bench, store_top
from engine.serve.observed import Observed
from kvstore.config import StoreConfig
from kvstore.store import TieredStore
from tests.engine.serve import figures
from tests.kvstore.make import chain, items

KEYS = chain(range(20))
OTHERS = chain(range(8), tenant=b"other")


@pytest.fixture
def headrace(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        status = main(["store", *map(str, args)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def store(tmp_path):
    with TieredStore.open(StoreConfig(host_bytes=0, disk_path=str(tmp_path / "kv"))) as made:
        made.put(items([*KEYS, *OTHERS]))
    return str(tmp_path / "kv")


def test_stat_says_who_has_what(headrace, store):
    found = json.loads(headrace("stat", "--store", store, "--json")[1])
    assert [row["blocks"] for row in found["groups"]] == [5, 2]
    assert sum(row["bytes"] for row in found["groups"]) == found["used_bytes"]
    assert found["ages"]["oldest_s"] < 600
    status, out, _ = headrace("stat", "--store", store)
    assert status == 0
    assert KEYS[0].tenant.hex() in out
    assert "exact" in out
    assert "last used" in out


def test_blocks_go_to_another_store_and_again_changes_nothing(headrace, store, tmp_path):
    assert headrace("export", "all", "--store", store)[0] == 0
    done = json.loads(headrace("import", "all", "--store", "new", "--json")[1])
    assert (done["stored"], done["present"], done["damaged"], done["skipped"]) == (7, 0, 0, 0)
    done = json.loads(headrace("import", "all", "--store", "new", "--json")[1])
    assert (done["stored"], done["present"]) == (0, 7)
    assert headrace("audit", "--store", "new")[0] == 0
    with TieredStore.open(StoreConfig(host_bytes=0, disk_path="new")) as made:
        assert (made.lookup(KEYS), made.lookup(OTHERS)) == (5, 2)


def test_one_tenants_blocks_may_be_exported(headrace, store):
    tag = OTHERS[0].tenant.hex()
    done = json.loads(headrace("export", "some", "--store", store, "--tenant", tag, "--json")[1])
    assert done["blocks"] == 2
    model = KEYS[0].identity.hex()[:12]
    done = json.loads(headrace("export", "f", "--store", store, "--identity", model, "--json")[1])
    assert done["blocks"] == 7
    assert json.loads(headrace("import", "some", "--store", "new", "--json")[1])["stored"] == 2


def test_what_is_no_file_is_not_replaced_by_one(headrace, store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    status, _, err = headrace("export", "pipe", "--store", store)
    assert (status, "got a folder or device: pipe" in err) == (1, True)
    assert (tmp_path / "pipe").is_fifo()


def test_damaged_blocks_are_refused_by_count_and_no_child_comes_alone(headrace, store, tmp_path):
    headrace("export", "all", "--store", store)
    data = bytearray((tmp_path / "all").read_bytes())
    data[data.index(KEYS[0].digest) + 200] ^= 1  # in the first block's entry
    (tmp_path / "all").write_bytes(data)
    status, out, _ = headrace("import", "all", "--store", "new", "--json")
    done = json.loads(out)
    assert (status, done["damaged"]) == (1, 1)
    assert (done["stored"], done["skipped"]) == (2, 4)
    assert headrace("audit", "--store", "new")[0] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("export", "f", "--store", "none"), "no store at none"),
        (("export", "f", "--tenant", "me"), "hexadecimal"),
        (("import", "none"), "No such file"),
        (("top", "--once", "--store", "none"), "no store at none"),
        (("top", "--once", "--url", "ftp://x"), "http://"),
        (("top", "--once", "--url", "http://127.0.0.1:9"), "no server at"),
        (("top", "--once", "--interval", "0"), "--interval"),
        (("top", "--interval", "nan"), "--interval"),
        (("top", "--interval", "inf"), "--interval"),
        (("bench", "--mib", "0"), "--mib"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(headrace, store, args, words):
    given = args if "--store" in args else (*args, "--store", store)
    status, _, err = headrace(*given)
    assert status == 1
    assert words in err
    assert len(err.splitlines()) == 1


def test_another_file_is_refused_before_a_store_is_made(headrace, tmp_path):
    (tmp_path / "text").write_text("hello")
    status, _, err = headrace("import", "text", "--store", "new")
    assert (status, "headrace store export" in err) == (1, True)
    assert not (tmp_path / "new").exists()


def test_top_shows_a_folder(headrace, store):
    status, out, _ = headrace("top", "--once", "--store", store)
    assert status == 0
    assert OTHERS[0].tenant.hex() in out
    found = json.loads(headrace("top", "--json", "--store", store)[1])
    assert [row["blocks"] for row in found["groups"]] == [5, 2]


def test_a_folders_name_may_look_like_markup(headrace, store, tmp_path):
    name = "a[/b]"
    shutil.copytree(store, tmp_path / name)
    for action in (("audit",), ("export", "a[/out]"), ("import", "a[/out]"), ("compact",)):
        assert headrace(*action, "--store", name)[0] == 0
    assert headrace("top", "--once", "--store", name)[1].startswith(f"{name}: ")


def test_top_shows_a_server(headrace):
    with figures.serving(figures.app(Observed("needle", figures.readings))) as url:
        status, out, _ = headrace("top", "--once", "--url", url)
    assert status == 0
    for words in ("needle", "host: team-a", "host: other", "90.1%", "22 blocks pinned"):
        assert words in out


def test_a_servers_tiers_as_json(headrace):
    with figures.serving(figures.app(Observed("needle", figures.readings))) as url:
        tiers = json.loads(headrace("top", "--json", "--url", url)[1])
    assert [tier["name"] for tier in tiers] == ["host", "disk"]
    assert tiers[0]["groups"][0]["tenant"] == "team-a"


def test_top_needs_a_key_that_sees_all(headrace):
    observed = Observed("needle", figures.readings)
    with figures.serving(figures.app(observed, keys=True)) as url:
        assert "401" in headrace("top", "--once", "--url", url)[2]
        assert headrace("top", "--once", "--url", url, "--key", "sk-all")[0] == 0


def test_top_looks_again_until_it_is_interrupted(headrace, store, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(store_top.time, "sleep", sleep)
    assert headrace("top", "--store", store, "--interval", "0.5")[0] == 130
    assert looks == [0.5] * 3


@pytest.mark.parametrize("mib", [1, 10**11])  # the second is more than any disk has
def test_bench_measures_the_disk_and_leaves_nothing(headrace, tmp_path, monkeypatch, mib):
    monkeypatch.setattr(store_bench, "SECONDS", 0.2)
    status, out, _ = headrace("bench", "--mib", mib, "--store", tmp_path / "kv", "--json")
    found = json.loads(out)
    assert status == 0
    assert min(found["put_gbps"], found["cold_get_gbps"], found["hot_get_gbps"]) > 0
    assert found["path"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bench_measures_no_reads_that_failed(headrace, tmp_path, monkeypatch):
    monkeypatch.setattr(store_bench, "SECONDS", 0)
    monkeypatch.setattr(store_bench.TieredStore, "read_many", lambda *args: [False])
    status, out, err = headrace("bench", "--mib", 64, "--store", tmp_path / "kv")
    assert (status, out) == (1, "")
    assert "cannot be read" in err
