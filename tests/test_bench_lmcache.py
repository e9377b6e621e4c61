"""The bench beside LMCache, without LMCache: its plumbing, its judge, its way out."""

import importlib
import json
import stat
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = {"host_put", "host_get", "disk_put", "disk_get"}
ANSWERING = """
import json, sys
print(json.dumps({"lmcache": "none"}), flush=True)
for line in sys.stdin:
    print(json.dumps(%s), flush=True)
"""


@pytest.fixture
def part(monkeypatch):
    """Modules of the script, by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def stand_in(folder: Path, answer: str) -> Path:
    """A program that answers like the worker, whatever its arguments."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n" + ANSWERING % answer)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="drops pages as Linux does")
def test_ratios_are_ours_over_theirs(tmp_path, part):
    python = stand_in(tmp_path, '{"seconds": 2.0, "right": True}')
    options = Namespace(folder=tmp_path, blocks=4, rounds=1, rest=0.0)
    bench = part("store_bench.beside_lmcache").beside_lmcache(python, options)
    assert set(bench.summary()) == CONTRACT
    for row, sides in bench.rows.items():
        assert sides["lmcache"] == pytest.approx([bench.nbytes / 1e9 / 2.0] * len(sides["ours"]))
        if row in CONTRACT:
            assert bench.summary()[row] == sides["ours"][0] / sides["lmcache"][0]
    assert bench.about == {"lmcache": "none"}
    assert json.loads(json.dumps(bench.record()))["ratios"].keys() == bench.rows.keys()
    assert "disk_put_unsynced" in bench.table()
    record = bench.record() | {"theirs": {"lmcache": "0"}}
    assert f"{bench.ratio('disk_put'):.2f}" in part("store_bench.tables").beside_lmcache(record)


def test_values_that_come_back_wrong_end_the_bench(tmp_path, part):
    process = part("store_bench.process")
    python = stand_in(tmp_path, '{"seconds": 2.0, "right": "get" not in line}')
    with process.Process([str(python)], tmp_path / "log") as worker:
        assert worker.seconds("host_put") == 2.0
        with pytest.raises(process.WorkerFailed, match="not what was stored"):
            worker.seconds("host_get")


def test_a_worker_that_dies_says_why(tmp_path, part):
    process = part("store_bench.process")
    python = stand_in(tmp_path, 'sys.exit("no disk")')
    with process.Process([str(python)], tmp_path / "log") as worker:
        with pytest.raises(process.WorkerFailed, match="no disk"):
            worker.seconds("host_put")
        with pytest.raises(process.WorkerFailed):
            worker.seconds("host_put")


def test_an_environment_is_made_once(tmp_path, part, monkeypatch):
    module = part("store_bench.environment")
    ran = []
    monkeypatch.setattr(module, "_run", lambda command: ran.append(command))
    (tmp_path / "env").mkdir()
    for _ in range(2):
        assert module.environment(tmp_path / "env") == tmp_path / "env" / "bin" / "python"
    torch, lmcache = (
        next(i for i, c in enumerate(ran) if x in c) for x in (module.TORCH, module.LMCACHE)
    )
    assert torch < lmcache, "pip would take torch with CUDA for LMCache"
    assert len(ran) == 4


def test_without_lmcache_the_bench_says_so_and_exits_with_2(tmp_path, part, monkeypatch, capsys):
    (tmp_path / "file").touch()
    wanted = ["bench_store.py", "--lmcache", "--lmcache-env", str(tmp_path / "file")]
    monkeypatch.setattr(sys, "argv", wanted)
    with pytest.raises(SystemExit) as stopped:
        part("bench_store").main()
    assert stopped.value.code == 2
    assert "LMCache cannot be installed here" in capsys.readouterr().err
