"""`headrace-eval report`."""

import argparse
import builtins
import json

import pytest

from engine.errors import ConfigError, EngineError
from evals.commands import report
from tests.evals.report.make import floor, folder, record, records


@pytest.fixture
def run(capsys):
    def run(*args):
        parser = argparse.ArgumentParser()
        report.add(parser)
        status = report.run(parser.parse_args([str(arg) for arg in args]))
        return status, *capsys.readouterr()

    return run


def made():
    return records("dense", [100.0] * 4) + floor(4) + records("quest", [100.0, 0.0] * 2, 0.05)


def test_tables_go_to_stdout_and_files_into_the_first_folder(tmp_path, run):
    status, out, err = run(folder(tmp_path / "run", made()))
    assert status == 0
    assert "ruler · single needle" in out
    assert "−50.0" in out
    assert f"{tmp_path}/run/report.html" in err
    assert (tmp_path / "run" / "report.html").exists()


def test_out_names_another_folder(tmp_path, run):
    run(folder(tmp_path / "run", made()), "--out", tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "summary.csv").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_several_folders_are_one_report(tmp_path, run):
    one = folder(tmp_path / "one", records("dense", [100.0] * 4))
    two = folder(tmp_path / "two", records("quest", [100.0, 0.0] * 2, 0.05))
    run(one, two, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (quest,) = [each for each in summary["families"][0]["scores"] if each["method"] == "quest"]
    assert quest["difference"] == -50.0
    assert [each["folder"] for each in summary["runs"]] == [str(one), str(two)]


def test_a_report_of_a_run_that_was_killed_is_that_of_its_whole_records(tmp_path, run):
    path = folder(tmp_path / "run", made())
    with (path / "records.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    status, out, _ = run(path)
    assert status == 0
    assert "−50.0" in out


def test_going_on_after_an_error_changes_the_report_to_that_of_a_whole_run(tmp_path, run):
    failed = [record(3, "quest", 0.05, None, error="no memory")]
    first = [each for each in made() if (each.method, each.id[-1]) != ("quest", "3")]
    run(folder(tmp_path / "resumed", first + failed + made()[-1:]))
    run(folder(tmp_path / "whole", made()))
    resumed, whole = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("resumed", "whole")
    )
    same = resumed.keys() - {"runs", "repeated"}
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}


def test_an_empty_folder_is_refused_in_one_line(tmp_path, run):
    with pytest.raises(ConfigError, match=r"no records of a run in [^\n]*$"):
        run(tmp_path)


def test_without_matplotlib_tables_and_data_are_there_and_one_line_says_what_is_missing(
    tmp_path, run, monkeypatch
):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name: refuse(name))
    with pytest.raises(EngineError, match=r"needs matplotlib: pip install 'headrace\[evals\]'$"):
        run(folder(tmp_path, made()))
    assert (tmp_path / "summary.md").exists()
    assert not (tmp_path / "report.html").exists()
