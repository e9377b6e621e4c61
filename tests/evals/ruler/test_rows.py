"""Where rows come from: files, folders, saved data sets, the hub, or the caller."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from evals.rows import default_source, read_rows
from evals.ruler import RulerSuite
from evals.ruler.documents import hotpotqa, squad
from tests.data import real_data


@pytest.fixture
def files(tmp_path, squad_rows, hotpotqa_rows):
    """The official files, and HotpotQA line by line."""
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad/dev.json").write_text(json.dumps({"version": "v2.0", "data": squad_rows}))
    (tmp_path / "hotpotqa").mkdir()
    (tmp_path / "hotpotqa/dev.json").write_text(json.dumps(hotpotqa_rows, indent=1))
    (tmp_path / "hotpotqa/dev_corpus.json").write_text("{}")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(x) + "\n" for x in hotpotqa_rows))
    return tmp_path


def test_files_folders_and_rows_give_the_same(files, squad_rows, hotpotqa_rows):
    expected = squad(squad_rows)
    assert squad(read_rows(files / "squad/dev.json")) == expected
    assert squad(read_rows(str(files / "squad"))) == expected
    assert squad(read_rows(iter(squad_rows))) == expected
    expected = hotpotqa(hotpotqa_rows)
    assert hotpotqa(read_rows(files / "hotpotqa")) == expected
    assert hotpotqa(read_rows(files / "lines.jsonl")) == expected


def test_a_line_separator_inside_a_text_does_not_end_a_line_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", "utf-8")
    assert read_rows(path) == [{"text": "a\u2028b\u0085c"}]


@pytest.fixture
def package(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_rows_loaded_by_datasets_are_those_of_the_file(files, package):
    folder = str(files / "loaded")
    loaded = package.load_dataset(
        "json", data_files=str(files / "hotpotqa/dev.json"), cache_dir=folder
    )
    expected = hotpotqa(read_rows(files / "hotpotqa"))
    assert hotpotqa(read_rows(loaded["train"])) == expected
    loaded.save_to_disk(files / "saved")
    loaded["train"].save_to_disk(files / "split")
    assert hotpotqa(read_rows(files / "saved")) == expected
    assert hotpotqa(read_rows(str(files / "split"))) == expected
    whole = package.load_dataset(
        "json", data_files=str(files / "squad/dev.json"), cache_dir=folder, split="train"
    )
    assert squad(read_rows(whole)) == squad(read_rows(files / "squad"))


def test_the_validation_split_is_taken_and_a_set_without_any_known_one_refused(files, package):
    rows = {"validation": [{"a": 1}], "train": [{"a": 2}]}
    made = package.DatasetDict({k: package.Dataset.from_list(v) for k, v in rows.items()})
    made.save_to_disk(files / "two")
    assert read_rows(files / "two") == [{"a": 1}]
    package.DatasetDict(other=made["train"]).save_to_disk(files / "other")
    with pytest.raises(ConfigError, match="none of the splits validation, dev, test, train"):
        read_rows(files / "other")


def test_samples_and_scores_do_not_depend_on_how_rows_were_loaded(files, package, words):
    loaded = package.load_dataset(
        "json", data_files=str(files / "lines.jsonl"), cache_dir=str(files / "x"), split="train"
    )
    for source in (loaded, files / "hotpotqa"):
        suite = RulerSuite(hotpotqa=source)
        samples = list(suite.samples(words, "qa_2", 600, 8))
        assert samples == list(
            RulerSuite(hotpotqa=files / "lines.jsonl").samples(words, "qa_2", 600, 8)
        )
        scores = [suite.score(x, 0, f"It is Person {i // 2 * 2}.") for i, x in enumerate(samples)]
        assert scores == [100.0, 0.0] * 4


def test_a_name_that_is_no_file_is_one_of_the_hub(package, monkeypatch):
    def load(path, config):
        if path == "nobody/nothing":
            raise FileNotFoundError("not on the hub")
        return {"validation": [{"path": path, "config": config}]}

    monkeypatch.setattr(package, "load_dataset", load)
    assert read_rows("a/b") == [{"path": "a/b", "config": None}]
    assert read_rows("a/b:c") == [{"path": "a/b", "config": "c"}]
    with pytest.raises(ConfigError, match="no data set nobody/nothing: not on the hub"):
        read_rows("nobody/nothing")


@pytest.mark.parametrize("name", ["gone.json", "./gone", Path("gone"), "/gone/x.jsonl"])
def test_a_missing_file_is_named_and_not_looked_for_on_the_hub(name):
    with pytest.raises(ConfigError, match=f"there is no {name}"):
        read_rows(name)


def test_broken_json_and_ambiguous_folders_are_named(tmp_path):
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(ConfigError, match=r"a\.json cannot be read as JSON"):
        read_rows(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"it has a\.json, b\.jsonl: name one"):
        read_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it has none: name one"):
        read_rows(tmp_path / "empty")


def test_without_the_package_a_saved_set_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[evals\]'"):
        read_rows(tmp_path)


def test_the_default_is_under_headrace_data(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path))
    assert default_source("squad", "--squad") == tmp_path / "squad"
    monkeypatch.delenv("HEADRACE_DATA")
    with pytest.raises(ConfigError, match="name it with --squad, or set HEADRACE_DATA"):
        default_source("squad", "--squad")


def test_the_real_files_have_the_questions_they_are_known_to_have(package, tmp_path):
    corpus = squad(read_rows(real_data("squad")))
    assert len(corpus.questions) == 2910
    corpus = hotpotqa(read_rows(real_data("hotpotqa")))
    assert (len(corpus.documents), len(corpus.questions)) == (994, 100)
    loaded = package.load_dataset(
        "json",
        data_files=str(real_data("hotpotqa/hotpotqa_train_100.json")),
        cache_dir=str(tmp_path),
        split="train",
    )
    assert hotpotqa(loaded) == corpus


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.json.* cannot be read as JSON"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyError, TypeError])
def test_a_damaged_saved_set_is_refused(tmp_path, monkeypatch, error):
    def load_from_disk(folder):
        raise error("damaged")

    package = SimpleNamespace(load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", package)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read as a saved data set: .*damaged"):
        read_rows(tmp_path)
