"""The arrow between packages points one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "native": set(),
    "kvstore": {"native"},
    "retrieval": {"native"},
    "engine": {"native", "kvstore", "retrieval"},
    "evals": {"native", "kvstore", "retrieval", "engine"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} & MAY_IMPORT.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= MAY_IMPORT[package] | {package}, path


def test_the_packages_are_those_of_the_distribution():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == MAY_IMPORT.keys()


def test_nothing_but_kernels_needs_triton_which_is_not_everywhere():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import engine.engine, engine.rag, engine.cli, evals.cli, native.gpu"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
