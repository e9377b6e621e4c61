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
# The engine's folders. Modules beside them may be used by all of these.
FOLDERS: dict[str, set[str]] = {
    "kernels": {"model"},
    "model": {"kernels"},
    "sparse": {"kernels", "model"},
    "batch": {"kernels", "model", "sparse"},
    "blend": {"kernels", "model", "sparse"},
    "rag": {"blend"},
    "service": {"blend", "model", "sparse"},
    "serve": {"blend", "rag", "service"},
    "commands": {"demo", "kernels", "rag", "serve"},
    "demo": {"commands", "rag"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} & MAY_IMPORT.keys()


def folders(path: Path) -> set[str]:
    named = (name.split(".") for name in imported(path))
    return {parts[1] for parts in named if parts[0] == "engine" and len(parts) > 1} & FOLDERS.keys()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert packages(path) <= MAY_IMPORT[package] | {package}, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_between_the_folders_of_the_engine_point_down(folder):
    files = list((ROOT / "engine" / folder).rglob("*.py"))
    assert files
    for path in files:
        assert folders(path) <= FOLDERS[folder] | {folder}, path


def test_these_are_the_folders_of_the_engine():
    found = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert found == FOLDERS.keys()


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
