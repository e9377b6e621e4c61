"""Records: what was written is read again, whatever ended the process that wrote it."""

import math

import msgspec
import pytest

from engine.errors import ConfigError, EngineError
from evals.record import RECORDS, Journal, Record, read_records
from evals.task import Sample, Turn

SAMPLE = Sample(
    id="suite/task/100/0",
    suite="suite",
    task="task",
    family="family",
    length=100,
    context="text",
    turns=(Turn("?", "", ("one",), 4), Turn("??", "", ("two", "2"), 4)),
    extra={"depth": 0.25},
)


def record(turn=0, method="headrace", budget=0.016, **found):
    return Record.of(SAMPLE, turn, method, budget, **found)


@pytest.fixture
def folder(tmp_path):
    """With three records in it."""
    journal = Journal(tmp_path)
    journal.add([record(score=100.0), record(1, score=0.5), record(0, "dense", None)])
    journal.close()
    return tmp_path


def test_a_record_knows_its_sample():
    made = record(1, score=1.5)
    assert (made.id, made.task, made.family, made.length) == (SAMPLE.id, "task", "family", 100)
    assert made.outputs == ("two", "2")
    assert made.extra == {"depth": 0.25}
    assert record(suite="fidelity").suite == "fidelity"


def test_what_is_written_is_read(folder):
    first, second, third = read_records(folder)
    assert first == record(score=100.0)
    assert second == record(1, score=0.5)
    assert third == record(0, "dense", None)


def test_keys_differ_by_all_that_makes_a_record_another():
    made = [
        record(),
        record(1),
        record(method="quest"),
        record(budget=0.02),
        record(budget=None),
        record(suite="speed"),
    ]
    assert len({one.key for one in made}) == len(made)


def test_a_key_is_the_same_after_reading():
    whole = record(budget=256.0)
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Record).key == whole.key


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measure_that_json_has_no_word_for_is_refused(value):
    with pytest.raises(EngineError, match="kl is"):
        record(measures={"kl": value})


def test_every_way_to_cut_the_last_line_short_leaves_the_lines_before(folder):
    path = folder / RECORDS
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for size in range(last, len(whole), 7):
        path.write_bytes(whole[:size])
        assert len(read_records(folder)) == 2
        journal = Journal(folder)
        assert path.read_bytes() == whole[:last]
        journal.add([record(0, "dense", None)])
        journal.close()
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(folder):
    path = folder / RECORDS
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b'{"id": 3}', *lines[2:]]))
    with pytest.raises(ConfigError, match="line 2"):
        read_records(folder)
    with pytest.raises(ConfigError, match="line 2"):
        Journal(folder)


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no records of a run"):
        read_records(tmp_path)


def test_what_is_there_is_not_added_again(folder):
    before = (folder / RECORDS).read_bytes()
    journal = Journal(folder)
    journal.add([record(score=7.0)])
    assert journal.has(record().key)
    journal.close()
    assert (folder / RECORDS).read_bytes() == before


def test_a_failure_gives_way_to_what_comes_later(tmp_path):
    journal = Journal(tmp_path)
    journal.add([record(error="no memory")])
    journal.add([record(error="no memory")])
    assert len(read_records(tmp_path)) == 1
    assert not journal.has(record().key)
    assert journal.failures == 1
    journal.add([record(score=1.0)])
    assert journal.has(record().key)
    assert (journal.failures, len(journal.records)) == (0, 1)
    journal.close()
    again = Journal(tmp_path)
    assert again.records == [record(score=1.0)]
    again.close()


def test_two_runs_do_not_write_to_one_folder(folder):
    first = Journal(folder)
    with pytest.raises(ConfigError, match="another run"):
        Journal(folder)
    first.close()
    Journal(folder).close()
