"""Reading runs: what is merged, and what is refused in one line."""

import pytest

from engine.errors import ConfigError
from evals.report.load import load_runs
from tests.evals.report.make import FACTS, folder, record, records


def test_folders_are_merged(tmp_path):
    one = folder(tmp_path / "one", records("dense", [100, 0]))
    two = folder(tmp_path / "two", records("headrace", [100, 0], 0.016))
    found = load_runs([one, two])
    assert [each.method for each in found.records] == ["dense"] * 2 + ["headrace"] * 2
    assert [run.records for run in found.runs] == [2, 2]
    assert found.repeated == 0


def test_of_two_records_with_one_key_the_later_counts_and_the_other_is_counted(tmp_path):
    one = folder(tmp_path / "one", [record(0, score=0.0)])
    two = folder(tmp_path / "two", [record(0, score=100.0)])
    found = load_runs([one, two])
    assert [each.score for each in found.records] == [100.0]
    assert found.repeated == 1


@pytest.mark.parametrize("first", [True, False])
def test_an_error_gives_way_to_an_answer_in_any_order(tmp_path, first):
    failed = record(0, score=None, error="no memory")
    made = [failed, record(0)] if first else [record(0), failed]
    found = load_runs([folder(tmp_path, made)])
    assert [each.error for each in found.records] == [None]


def test_a_torn_last_line_is_no_record(tmp_path):
    made = folder(tmp_path, records("dense", [100, 100]))
    with (made / "records.jsonl").open("ab") as file:
        file.write(b'{"id": "torn", "suite": "ru')
    assert len(load_runs([made]).records) == 2


def refused(*folders):
    with pytest.raises(ConfigError) as caught:
        load_runs(folders)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_empty_folder_is_refused(tmp_path):
    assert "no records of a run in" in refused(tmp_path)
    assert "no records of a run in" in refused(tmp_path / "nowhere")


def test_a_run_without_an_answer_yet_is_refused(tmp_path):
    assert "no records yet in" in refused(folder(tmp_path, []))


def test_two_models_are_refused(tmp_path):
    one = folder(tmp_path / "one", [record(0)])
    two = folder(tmp_path / "two", [record(1)], FACTS | {"weights": "cd" * 32, "model": "other"})
    assert "runs of two models: models/test (bfloat16)" in refused(one, two)


def test_the_same_weights_under_another_name_are_one_model(tmp_path):
    one = folder(tmp_path / "one", [record(0)])
    two = folder(tmp_path / "two", [record(1)], FACTS | {"model": "/elsewhere/test"})
    assert len(load_runs([one, two]).records) == 2


def test_a_method_with_two_settings_is_refused(tmp_path):
    other = {"method": ["quest"], "settings": {"quest": {"window": 32}}}
    one = folder(tmp_path / "one", [record(0)])
    two = folder(tmp_path / "two", [record(1)], FACTS | {"settings": other})
    assert "quest has settings of its preset in" in refused(one, two)


def test_a_method_that_only_one_run_has_may_have_any_settings(tmp_path):
    other = {"method": ["shadowkv"], "settings": {"shadowkv": {"rank": 48}}}
    one = folder(tmp_path / "one", [record(0)])
    two = folder(tmp_path / "two", [record(1)], FACTS | {"settings": other})
    assert len(load_runs([one, two]).records) == 2


def test_other_prompts_under_the_same_names_are_refused(tmp_path):
    one = folder(tmp_path / "one", [record(0)])
    two = folder(tmp_path / "two", [record(0, "quest", 0.1, prompt_sha256="of another seed")])
    assert "has one prompt in" in refused(one, two)


def test_a_run_json_that_is_none_is_refused(tmp_path):
    made = folder(tmp_path, [record(0)])
    (made / "run.json").write_text("{")
    assert "is not JSON" in refused(made)
    (made / "run.json").write_text("[]")
    assert "must hold an object" in refused(made)


@pytest.mark.parametrize(
    "facts",
    [
        '{"starts": [1]}',
        '{"starts": 1}',
        '{"settings": []}',
        '{"settings": {"method": 1}}',
        "[" * 100_000,
    ],
)
def test_facts_that_no_run_wrote_are_refused(tmp_path, facts):
    made = folder(tmp_path, [record(0)])
    (made / "run.json").write_text(facts)
    assert "run.json" in refused(made)
