"""Rows: the same from files, from `datasets`, and from the hub's archive."""

import json
import zipfile

import pytest

from engine.errors import ConfigError
from evals.longbench import LongBenchSuite
from evals.longbench.rows import rows_of
from evals.longbench.tasks import TASKS
from evals.rows import read_rows
from tests.data import real_data

LENGTH, COUNT = 1000, 40


@pytest.fixture(scope="module")
def datasets():
    package = pytest.importorskip("datasets", reason="the package datasets is not installed")
    package.disable_progress_bars()
    return package


class Letters:
    """A token for each letter: nothing is faster, and real texts are long."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def write(folder, rows):
    for task, found in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def loaded(datasets, folder, cache):
    """All files of a folder as `datasets` reads them."""

    def load(task):
        file = str(folder / f"{task}.jsonl")
        return datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(cache))

    return {task: load(task) for task in TASKS if (folder / f"{task}.jsonl").exists()}


def scored(suite):
    """Samples, and scores of predictions that are nearly right, and wrong."""
    found = {}
    for task in suite.tasks:
        for sample in suite.samples(Letters(), task, LENGTH, COUNT):
            said = (sample.turns[0].outputs[0][:200], sample.context[-100:])
            found[sample.id] = sample, [suite.score(sample, 0, text) for text in said]
    return found


def test_every_data_set_is_read_in_its_order(tmp_path, rows):
    suite = LongBenchSuite(write(tmp_path, rows))
    assert suite.tasks == tuple(TASKS)
    samples = list(suite.samples(Letters(), "qasper", 4000, 2))
    assert [x.id for x in samples] == ["longbench/qasper/4000/0", "longbench/qasper/4000/1"]
    assert "What is number 1?" in samples[1].turns[0].question
    assert len(list(suite.samples(Letters(), "qasper", 4000, 99))) == 3


def test_rows_through_datasets_are_those_of_the_files(tmp_path, rows, datasets):
    some = ("qasper", "vcsum", "trec", "passage_retrieval_zh", "repobench-p")
    folder = write(tmp_path, {task: rows[task] for task in some})
    expected = scored(LongBenchSuite(folder))
    assert len(expected) == 15
    found = loaded(datasets, folder, tmp_path / "cache")
    assert scored(LongBenchSuite(found)) == expected
    for task, table in found.items():
        table.save_to_disk(tmp_path / "saved" / task)
    assert scored(LongBenchSuite(tmp_path / "saved")) == expected


def test_real_rows_score_the_same_through_datasets(tmp_path, datasets):
    folder = real_data("longbench/mini")
    expected = scored(LongBenchSuite(folder))
    assert len(expected) == 237
    assert scored(LongBenchSuite(loaded(datasets, folder, tmp_path))) == expected


def test_real_hotpotqa_is_the_same_through_datasets(tmp_path, datasets):
    file = real_data("hotpotqa/hotpotqa_train_100.json")
    table = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path))["train"]
    table.save_to_disk(tmp_path / "saved")
    expected = read_rows(file)
    assert len(expected) == 100
    for found in (read_rows(table), read_rows(tmp_path / "saved")):
        for one, other in zip(found, expected, strict=True):
            assert {k: one[k] for k in ("question", "answer")} == {
                k: other[k] for k in ("question", "answer")
            }
            assert json.dumps(one["context"]) == json.dumps(other["context"])


def test_line_ends_of_unicode_are_text(tmp_path, rows):
    odd = rows["qasper"][0] | {"context": "one\u2028two\x85three\x0cfour"}
    write(tmp_path, {"qasper": [odd]})
    assert [x.context for x in rows_of(tmp_path, "qasper")] == [odd["context"]]


def test_the_hub_has_an_archive_of_all_files(tmp_path, rows, monkeypatch):
    asked = []

    def download(repo, file, *, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / "data.zip")

    write(tmp_path, rows)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for task in TASKS:
            archive.write(tmp_path / f"{task}.jsonl", f"data/{task}.jsonl")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert scored(LongBenchSuite()) == scored(LongBenchSuite(tmp_path))
    assert set(asked) == {("THUDM/LongBench", "data.zip", "dataset")}


def test_without_a_network_the_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    suite = LongBenchSuite()
    with pytest.raises(ConfigError, match=r"unpack it .* name its folder with --longbench"):
        next(suite.samples(Letters(), "qasper", 4000, 1))


def test_no_rows_are_an_error(tmp_path, rows):
    with pytest.raises(ConfigError, match=r"has no rows of LongBench: there must be files like"):
        LongBenchSuite(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="this mapping has no rows of LongBench"):
        LongBenchSuite({"train": []})
    suite = LongBenchSuite({"trec": rows["trec"], "qasper": rows["qasper"]})
    assert suite.tasks == ("qasper", "trec")
    with pytest.raises(ConfigError, match="no rows of samsum, but of qasper, trec"):
        next(suite.samples(Letters(), "samsum", 4000, 1))


def test_a_row_of_another_form_is_named(rows):
    bad = rows["qasper"][0] | {"answers": "just one"}
    suite = LongBenchSuite({"qasper": [rows["qasper"][0], bad]})
    with pytest.raises(ConfigError, match=r"qasper, row 2, .*answers"):
        list(suite.samples(Letters(), "qasper", 4000, 2))
