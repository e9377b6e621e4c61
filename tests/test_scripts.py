"""The scripts, in a copy of the tree with programs that only note how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["scripts/install", "scripts/demo", "scripts/test", "scripts/check", "scripts/gpu_check"]
TOOLS = ("bash", "env", "dirname", "cat", "cksum", "mkdir", "chmod")


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path):
    """A project with the scripts and nothing else."""
    root = tmp_path / "project"
    for name in (*SCRIPTS, ".ci/run", "pyproject.toml", "constraints.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"{tool} is needed to run the scripts"
        program(tmp_path / "bin" / tool, f'exec {found} "$@"')
    return root


def run(root: Path, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    """Run a script from elsewhere, with the programs in `bin` only."""
    base = root.parent
    return subprocess.run(
        [str(root / script), *args],
        cwd=base,
        env={"PATH": str(base / "bin"), "LOG": str(base / "log"), "HOME": str(base)} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def log(root: Path) -> list[str]:
    file = root.parent / "log"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("name", [*SCRIPTS, ".ci/run"])
def test_a_script_can_be_run_and_parsed(name):
    assert os.access(ROOT / name, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / name)], check=False).returncode == 0
    assert "set -euo pipefail" in (ROOT / name).read_text()


def test_an_old_python_is_refused_in_one_line(tree):
    program(tree.parent / "bin" / "python3", '[ "$1" = --version ] && echo Python 3.9.1 || exit 1')
    done = run(tree, "scripts/install")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "Python 3.11 or newer is needed, found Python 3.9.1" in line


def test_a_python_without_venv_is_refused_in_one_line(tree):
    program(tree.parent / "bin" / "python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    done = run(tree, "scripts/install")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "apt install python3-venv" in line
    assert not (tree / ".venv").exists()


def test_install_takes_torch_first_and_does_nothing_the_second_time(tree):
    program(tree / ".venv" / "bin" / "python", 'echo "$*" >>"$LOG"')
    assert run(tree, "scripts/install", HEADRACE_TORCH_INDEX="https://wheels").returncode == 0
    first = log(tree)
    assert first[0].endswith("--index-url https://wheels torch --quiet --disable-pip-version-check")
    assert "[dev]" in first[1]
    assert "[dev,cpu]" in first[2]
    assert all("constraints.txt" in line for line in first)
    assert run(tree, "scripts/install").returncode == 0
    assert log(tree) == first
    (tree / "constraints.txt").write_text("torch==9\n")
    assert run(tree, "scripts/install").returncode == 0
    assert len(log(tree)) == 2 * len(first)


def test_install_chooses_the_gpu_extra_where_there_is_one(tree):
    program(tree.parent / "bin" / "nvidia-smi", "true")
    program(tree / ".venv" / "bin" / "python", 'echo "$*" >>"$LOG"')
    assert run(tree, "scripts/install").returncode == 0
    assert "[dev,gpu]" in log(tree)[-1]
    assert "--index-url" not in log(tree)[0]


def test_a_failed_install_is_tried_again(tree):
    program(tree / ".venv" / "bin" / "python", 'echo "$*" >>"$LOG"', "exit 1")
    assert run(tree, "scripts/install").returncode == 1
    assert run(tree, "scripts/install").returncode == 1
    assert len(log(tree)) == 2


def test_demo_passes_its_arguments_on_and_keeps_stdout_clean(tree):
    program(tree / ".venv" / "bin" / "python", "echo noise")
    program(tree / ".venv" / "bin" / "headrace", 'echo "$*"')
    done = run(tree, "scripts/demo", "--json", "--tokens", "99")
    assert (done.returncode, done.stdout) == (0, "demo --json --tokens 99\n")


@pytest.mark.parametrize(
    ("args", "marks"),
    [
        (("-x",), "not slow and not gpu -x"),
        (("--slow", "-x"), "not gpu --hypothesis-profile=thorough -x"),
        ((), "not slow"),
    ],
)
def test_test_leaves_out_what_is_slow_unless_asked(tree, args, marks):
    program(tree / "scripts" / "install", "true")
    program(
        tree / ".venv" / "bin" / "python",
        'case "$1" in -c) echo 2 ;; *) echo "$OMP_NUM_THREADS $PWD $*" ;; esac',
    )
    done = run(tree, "scripts/test", *args)
    assert done.returncode == 0
    assert done.stdout.startswith(f"1 {tree} -m pytest -n 2 -m {marks}")


def test_check_stops_at_the_first_complaint(tree):
    program(tree / "scripts" / "install", "true")
    program(tree / ".venv" / "bin" / "ruff", 'echo "ruff $*"', '[ "$1" = format ]')
    done = run(tree, "scripts/check")
    assert done.returncode != 0
    assert done.stdout.splitlines() == ["ruff format --check .", "ruff check ."]


def test_ci_finds_the_data_beside_the_project(tree):
    program(tree / "scripts" / "test", 'echo "$HEADRACE_DATA"')
    assert run(tree, ".ci/run").stdout == "\n"
    data = tree.parent / "shared" / "data"
    data.mkdir(parents=True)
    assert run(tree, ".ci/run").stdout == f"{data}\n"
    assert run(tree, ".ci/run", HEADRACE_DATA="/mine").stdout == "/mine\n"


def test_gpu_check_needs_a_gpu_and_names_what_is_missing(tree):
    python = tree.parent / "bin" / "python3"
    program(python, "exit 1")
    done = run(tree, "scripts/gpu_check")
    assert (done.returncode, "no torch" in done.stderr) == (1, True)
    program(python, 'case "$2" in *is_available*) exit 1 ;; esac')
    done = run(tree, "scripts/gpu_check")
    assert (done.returncode, "finds no GPU" in done.stderr) == (1, True)
    program(python, '[ "$1" = - ] && echo lmdb pytest', "exit 0")
    done = run(tree, "scripts/gpu_check")
    assert done.returncode == 1
    assert "lacks lmdb pytest" in done.stderr.splitlines()[-1]
    assert "HEADRACE_WHEELS" in done.stderr.splitlines()[-1]
