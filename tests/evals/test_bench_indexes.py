"""The benchmark of indexes still runs and says what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_indexes.py"
ROW = {"bytes_per_token", "real", "clustered", "scattered", "flat", "sink", "drift"}


def run(*options):
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_benchmark_of_indexes_ends_with_one_json_line(tmp_path):
    pytest.importorskip("faiss", reason="codebooks are trained by FAISS")
    size = ["--seeds", "1", "--tokens", "4096", "--real-tokens", "1500", "--jobs", "2"]
    found = json.loads(run("--json", *size).splitlines()[-1])
    default = found.pop("default")
    assert default == "scalar@32"
    assert len(found) == 20
    for key, row in found.items():
        assert set(row) == ROW
        assert 1 <= row["bytes_per_token"] <= int(key.split("@")[1]) + 2
        assert all(0 < row[name] < 1.2 for name in ROW - {"bytes_per_token"})
    for name in ("landmarks@32", "quest@32"):
        assert found[name]["scattered"] < 0.6 < found[default]["scattered"]


def test_an_index_takes_the_bytes_of_its_class_at_any_head_dim(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import bench_indexes
    import torch

    from engine.method import Method
    from engine.model.pieces import Shape
    from engine.sparse.indexes import make_index

    for dim in (64, 128):
        seen = set()
        for member in bench_indexes.members(dim):
            shape = Shape(1, 4, 1, dim, 1, 9999, torch.bfloat16, torch.device("cpu"))
            index = make_index(Method(index=member.index, options=member.options), shape, 328)
            size = index.spec.bytes_per_token
            if member.index == "scalar":
                assert size == member.options["bits"] * dim / 8 + 2 <= member.size + 2
            else:
                assert size == (2 if member.index == "vq" else member.size)
            seen.add(member.key)
        assert len(seen) == 20
