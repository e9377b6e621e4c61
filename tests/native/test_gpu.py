"""Compiling kernels without a GPU, and where kernels run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from native.gpu import Build, compiled, interpreted, kernel_modules, on_gpu

ROOT = Path(__file__).parents[2]
KERNELS = """
import triton
import triton.language as tl

from native.gpu import Build

@triton.jit
def double(x, y, n, RUN: tl.constexpr, OUT: tl.constexpr):
    at = tl.program_id(0) * RUN + tl.arange(0, RUN)
    tl.store(y + at, (2 * tl.load(x + at, mask=at < n, other=0).to(tl.float32)).to(OUT), at < n)


@triton.jit
def wide(x, y, RUN: tl.constexpr):
    at = tl.arange(0, RUN)
    found = tl.load(x + at)
    tl.debug_barrier()
    tl.store(y + at, found * tl.sum(found))


CONSTANTS = {"RUN": 1024, "OUT": tl.bfloat16}
TYPES = {"OUT": "constexpr", "n": "i32", "y": "*bf16", "x": "*fp32", "RUN": "constexpr"}
AOT = [
    Build("fits", double, TYPES, CONSTANTS),
    Build("spills", wide, {"x": "*fp32", "y": "*fp32", "RUN": "constexpr"}, {"RUN": 8192}, 1),
    Build("lacks", double, TYPES | {"more": "i32"}, CONSTANTS),
    Build("unset", double, TYPES, {"RUN": 1024}),
    Build("fails", double, TYPES, CONSTANTS | {"RUN": 1000}),
]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "planted.py").write_text(KERNELS)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "TRITON_CACHE_DIR": str(folder / "cache")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "native.gpu", "planted", "--arch", "90", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_what_a_kernel_needs_is_reported_and_what_fails_hides_nothing(folder):
    done = run(folder, "--json")
    [line] = done.stdout.splitlines()
    found = {name: by_arch["sm_90"] for name, by_arch in json.loads(line)["planted"].items()}
    assert done.returncode == 1  # three of the five
    assert found["fits"]["spill_bytes"] == 0
    assert 0 < found["fits"]["registers"] < 64
    assert found["spills"]["spill_bytes"] > 0 < found["spills"]["stack_bytes"]
    assert found["spills"]["registers"] >= found["fits"]["registers"]
    assert "more" in found["lacks"]["error"]
    assert "differ in ['OUT']" in found["unset"]["error"]
    assert "error" in found["fails"]
    said = run(folder).stdout.splitlines()
    assert len(said) >= len(found)
    assert "0 B spilled" in said[0]


def test_a_kernel_of_the_interpreter_is_refused(folder, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreted()
    spec = importlib.util.spec_from_file_location("planted", folder / "planted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RuntimeError, match="start Python without TRITON_INTERPRET"):
        compiled(module.AOT[0], 90)


@pytest.mark.parametrize(
    ("value", "means"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_the_interpreter_is_a_switch_of_the_environment(value, means, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() is means
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not interpreted()


def test_tensors_of_the_host_are_not_on_a_gpu():
    assert not on_gpu(torch.zeros(1), None)
    assert on_gpu(None)


def test_kernels_are_modules_with_builds_in_folders_of_that_name(tmp_path):
    for name, text in {
        "one/kernels/fast.py": "AOT = []",
        "one/kernels/typed.py": "AOT: list = []",
        "one/kernels/slow.py": "x = 1  # no AOT",
        "one/other/fast.py": "AOT = []",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kernel_modules(tmp_path) == ["one.kernels.fast", "one.kernels.typed"]


def test_triton_is_not_needed_to_import_it():
    code = "import sys; sys.modules['triton'] = None; import native.gpu; print(native.gpu.on_gpu())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr


def test_a_build_says_nothing_of_spills_unless_asked():
    assert Build("any", None, {}, {}).spills is None
