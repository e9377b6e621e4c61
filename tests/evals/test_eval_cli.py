"""`headrace-eval`: help, a run from the command line, and one clear line for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.model.loader import locate
from evals import registry
from evals.cli import COMMANDS, main
from evals.record import read_records
from tests.engine.families import build
from tests.evals import toy

ROOT = Path(__file__).parents[2]
ASKED = ["run", "--suite", "toy", "--tasks", "single", "--lengths", "200", "--limit", "1"]


@pytest.fixture(autouse=True)
def _toy(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.SUITES, "toy", toy.KIND)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def evaluate(capsys):
    """Runs a command in this process: its status, stdout and stderr."""

    def run(*words) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


def test_a_model_whose_layers_share_kv_is_refused(evaluate, tmp_path):
    build("gemma3n").save_pretrained(tmp_path / "model")
    for path in (ROOT / "models" / "needle-tiny").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    status, _, err = evaluate(*ASKED, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert status == 1
    assert "has layers that share KV: what a method costs" in err


def test_help_names_every_command(evaluate):
    status, out, err = evaluate("--help")
    assert (status, err) == (0, "")
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(evaluate, command):
    status, out, err = evaluate(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: headrace-eval {command}")


def test_help_of_a_run_is_enough_to_start_one(evaluate):
    _, out, _ = evaluate("run", "--help")
    said = " ".join(out.split())
    assert locate(re.search('model = "(.*?)"', said)[1]).is_dir()  # from wherever we are
    names = [*registry.SUITES.keys() - {"toy"}, *registry.MEASUREMENTS, "headrace", "oracle"]
    for word in (*names, "examples:", "[settings.shadowkv]", "exit status", "--dry-run", "4k"):
        assert word in said


def test_help_does_not_wait_for_torch():
    code = "import sys\nfrom evals.cli import build_parser\nbuild_parser(['run'])\n"
    code += "sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0


def test_a_run_notes_records_and_says_where(evaluate):
    status, out, err = evaluate(*ASKED, "--budget", "0.2", "--out", "found")
    assert status == 0
    assert out == "3 records in found: headrace-eval report found shows them\n"
    assert "100%" in err
    assert [x.method for x in read_records("found")] == ["dense", "headrace", "no context"]


def test_a_run_from_a_file_ends_in_one_line_of_json(evaluate, tmp_path):
    (tmp_path / "run.toml").write_text('suite = ["toy"]\nlengths = [200]\nmethod = ["dense"]\n')
    status, out, _ = evaluate("run", "--config", "run.toml", "--limit", 1, "--out", "a", "--json")
    assert status == 0
    assert json.loads(out) == {"out": "a", "records": 6, "errors": 0}


def test_what_could_not_be_asked_is_said_and_the_status_is_1(evaluate):
    status, out, err = evaluate(*ASKED, "--lengths", "100,200", "--out", "found")
    assert status == 1
    assert out.startswith("4 records in found")
    last = err.strip().splitlines()[-1]
    assert last.startswith("headrace-eval: 1 of 4 could not be asked, the first is toy/single/100")
    assert "1 failed" in err


def test_a_dry_run_prints_one_prompt_and_writes_nothing(evaluate, tmp_path):
    status, out, err = evaluate(*ASKED, "--dry-run")
    assert status == 0
    assert "What is the special magic number for" in out
    assert "toy/single/200/0" in err
    assert "right is ['" in err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*ASKED], "--out DIR is missing"),
        (["run", "--out", "a"], "suite is missing"),
        ([*ASKED, "--out", "a", "--method", "best"], "no method 'best'"),
        ([*ASKED, "--out", "a", "--suite", "best"], "no suite 'best'"),
        ([*ASKED, "--out", "a", "--tasks", "best"], "no task best"),
        ([*ASKED, "--out", "a", "--model", "/nowhere"], "model not found"),
        ([*ASKED, "--out", "a", "--config", "nowhere.toml"], "cannot read nowhere.toml"),
        ([*ASKED, "--out", "/proc/nowhere/a"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(evaluate, words, said):
    status, out, err = evaluate(*words)
    assert (status, out) == (1, "")
    assert said in err
    assert err.strip().splitlines()[-1].startswith("headrace-eval: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words", [["run", "--lengths", "4x"], ["run", "--budget", "much"], ["walk"], []]
)
def test_a_wrong_command_line_is_one_line_and_status_2(evaluate, words):
    status, out, err = evaluate(*words)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1


def test_a_folder_of_another_run_is_refused(evaluate):
    evaluate(*ASKED, "--budget", "0.2", "--out", "found")
    status, _, err = evaluate(*ASKED, "--budget", "0.3", "--out", "found")
    assert status == 1
    assert "budget is [0.3], was [0.2]" in err.strip().splitlines()[-1]
