"""Every kernel compiles ahead of time, for each generation of GPUs, and spills no registers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from native.gpu import ARCHES, kernel_modules

ROOT = Path(__file__).parents[1]


def report(*words: str) -> dict[str, dict[str, dict[str, dict]]]:
    """What `python -m native.gpu` says, without the interpreter that tests run kernels in."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "native.gpu", *words, "--json"]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def launched(path: Path) -> set[str]:
    """Names of what a file starts on a grid: kernel[grid](...)."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Call]
    grids = [func.value for func in calls if isinstance(func, ast.Subscript)]
    return {name.id for name in grids if isinstance(name, ast.Name)}


def test_every_module_that_launches_a_kernel_has_builds():
    found = kernel_modules(ROOT)
    files = sorted(ROOT.glob("*/kernels/*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert found == [name for name, path in zip(names, files) if launched(path)]
    assert len(found) > 10


@pytest.mark.parametrize(
    "arch", [pytest.param(x, marks=[] if x == 90 else pytest.mark.slow) for x in ARCHES]
)
def test_every_kernel_compiles_and_keeps_its_registers(arch):
    found = report(*kernel_modules(ROOT), "--arch", str(arch))
    assert found.keys() == set(kernel_modules(ROOT))
    for module, builds in found.items():
        assert builds, f"{module}: AOT is empty"
        for name, by_arch in builds.items():
            made = by_arch[f"sm_{arch}"]
            assert "error" not in made, f"{name}: {made['error']}"
            assert 0 < made["registers"] <= 255
            spilled = made["spill_bytes"]
            assert not spilled or made["may_spill"], f"{name} spills {spilled} bytes"
