"""`headrace-eval score`: predictions in files, in every form that they come in."""

import json
from argparse import ArgumentParser

import msgspec
import pytest

from engine.errors import ConfigError
from evals.commands import score as command
from evals.longbench import LongBenchSuite
from evals.record import RECORDS, Record
from evals.registry import SUITES
from evals.scored import score_file


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def scored(path, task=None):
    return [(x.group.task, x.samples, x.empty, x.score) for x in score_file(path, task)]


def run(*args):
    parser = ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args([str(arg) for arg in args]))


LONGBENCH = [
    {"pred": "Paris", "answers": ["Paris"], "all_classes": None, "length": 10},
    {"pred": "in Rome", "answers": ["Oslo", "Rome"], "all_classes": None, "length": 10},
    {"pred": " ", "answers": ["Oslo"], "all_classes": None, "length": 10},
]
V2 = [
    {"answer": "A", "difficulty": "easy", "length": "short", "pred": "A", "judge": True,
     "response": "The correct answer is (A)"},
    {"answer": "B", "difficulty": "hard", "length": "long", "pred": None, "judge": False,
     "response": "(B)"},
    {"answer": "C", "difficulty": "hard", "length": "short", "pred": "C", "judge": True,
     "response": "**The correct answer is C**"},
]  # fmt: skip


def test_longbenchs_predictions_are_of_the_data_set_that_the_file_is_named_after(tmp_path):
    path = write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    assert scored(path) == [("hotpotqa", 3, 1, 55.56)]  # 1, 2/3, 0
    assert scored(path, "narrativeqa") == [("narrativeqa", 3, 1, 55.56)]


def test_rows_that_say_their_data_set_are_scored_apart(tmp_path):
    rows = [LONGBENCH[0] | {"dataset": "qasper"}, LONGBENCH[1] | {"dataset": "lcc"}]
    assert scored(write(tmp_path / "x.jsonl", rows)) == [("qasper", 1, 0, 100), ("lcc", 1, 0, 73)]


def test_rulers_predictions(tmp_path):
    rows = [
        {"index": 0, "pred": "1 and 2", "outputs": ["1", "2", "3"]},
        {"index": 1, "prediction": "", "outputs": ["1"]},
    ]
    assert scored(write(tmp_path / "vt.jsonl", rows)) == [("vt", 2, 1, 33.33)]


def test_version_2_has_the_columns_of_its_table(tmp_path):
    assert scored(write(tmp_path / "model.jsonl", V2)) == [
        ("overall", 3, 0, 66.67),
        ("easy", 1, 0, 100),
        ("short", 2, 0, 100),
        ("hard", 2, 0, 50),
        ("long", 1, 0, 0),
    ]


def record(sample, said, method="dense", score=1.0):
    return Record.of(sample, 0, method, None, prediction=said, score=score)


@pytest.fixture
def journal(tmp_path, rows, plain):
    suite = LongBenchSuite(rows)
    found = []
    for task in ("trec", "passage_count"):
        for sample in suite.samples(plain, task, 3000, 2):
            right = sample.turns[0].outputs[0]
            found.append(record(sample, right))
            found.append(record(sample, f"{right} or Other 8", "headrace"))
            found.append(record(sample, "", "quest", score=None))
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [msgspec.json.encode(one) + b"\n" for one in found]
    (folder / RECORDS).write_bytes(b"".join(lines))
    return folder


def test_records_of_a_run_are_scored_again_by_their_suite(journal, tmp_path):
    expected = [
        ("trec", "dense", 2, 100),
        ("trec", "headrace", 2, 50),
        ("passage_count", "dense", 2, 100),
        ("passage_count", "headrace", 2, 50),
    ]

    def found(path):
        return [(x.group.task, x.group.method, x.samples, x.score) for x in score_file(path)]

    assert found(journal) == expected
    assert found(journal / RECORDS) == expected
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((journal / RECORDS).read_bytes())
    assert found(copy) == expected


@pytest.mark.parametrize("turn", [2, 10**12, -1])
@pytest.mark.parametrize("suite", [x for x in SUITES if not x.startswith("longbench")])
def test_records_of_every_suite_are_scored_again(tmp_path, suite, turn):
    made = dict(suite=suite, task="niah_multivalue", family="f", length=100, turn=turn)
    made |= dict(method="dense", budget=None, outputs=("1234567", "7654321"), score=0.0)
    rows = [
        msgspec.to_builtins(Record(**made, id="1", prediction="They are 1234567, 7654321.")),
        msgspec.to_builtins(Record(**made, id="2", prediction="")),
    ]
    (found,) = score_file(write(tmp_path / "x.jsonl", rows))
    assert (found.group.suite, found.samples, found.empty, found.score) == (suite, 2, 1, 50)


@pytest.mark.parametrize("suite", ["needle", "ruler", "rag"])
def test_records_without_outputs_are_refused(tmp_path, suite):
    made = dict(id="1", suite=suite, task="niah_multivalue", family="f", length=100, turn=0)
    made |= dict(method="dense", budget=None, outputs=(), score=0.0)
    rows = [msgspec.to_builtins(Record(**made, prediction="1234567"))]
    with pytest.raises(ConfigError, match="no outputs to compare"):
        score_file(write(tmp_path / "x.jsonl", rows))


def test_records_of_longbench_v2_count_in_each_column_of_its_table(tmp_path):
    made = dict(suite="longbench-v2", family="f", length=100, turn=0, score=0.0)
    made |= dict(method="dense", budget=None, outputs=("B",), prediction="The correct answer is B")
    rows = [
        msgspec.to_builtins(Record(**made, id=task, task=task, extra={"difficulty": level}))
        for task, level in (("short", "easy"), ("long", "hard"))
    ]
    rows[1]["prediction"] = "I do not know."
    found = {x.group.task: x.score for x in score_file(write(tmp_path / "x.jsonl", rows))}
    assert found == {"overall": 50, "easy": 100, "short": 100, "hard": 0, "long": 0}


def test_a_choice_that_was_found_already_is_one(tmp_path):
    row = {"answer": "B", "difficulty": "easy", "length": "short"}
    rows = [row | {"pred": "B"}, row | {"pred": "C"}, row | {"pred": None, "response": "B, no"}]
    found = score_file(write(tmp_path / "x.jsonl", rows))
    assert [x.score for x in found] == [33.33] * 3


def test_a_task_is_not_for_records_of_a_run(journal):
    with pytest.raises(ConfigError, match="omit --task"):
        score_file(journal, "trec")


def test_of_records_of_one_key_the_last_one_counts(journal):
    first, *others = (journal / RECORDS).read_bytes().splitlines(keepends=True)
    right = msgspec.json.decode(first, type=Record)
    wrong = msgspec.json.encode(msgspec.structs.replace(right, prediction="")) + b"\n"
    (journal / RECORDS).write_bytes(b"".join([wrong, first, *others]))
    dense = score_file(journal)[0]
    assert (dense.samples, dense.score) == (2, 100)


def test_a_torn_last_line_is_no_record(journal):
    with (journal / RECORDS).open("ab") as file:
        file.write(b'{"id": "lon')
    assert len(score_file(journal)) == 4


def test_the_command_prints_a_table(tmp_path, journal, capsys):
    assert run(write(tmp_path / "hotpotqa.jsonl", LONGBENCH), journal) == 0
    shown = capsys.readouterr().out
    assert "hotpotqa.jsonl" in shown
    assert "55.56" in shown
    assert "headrace" in shown


def test_the_command_prints_one_line_of_json(tmp_path, capsys):
    path = write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    assert run(path, write(tmp_path / "v2.jsonl", V2), "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found[0] == {
        "file": str(path), "suite": "longbench", "task": "hotpotqa", "samples": 3, "empty": 1,
        "score": 55.56,
    }  # fmt: skip
    assert [x["task"] for x in found[1:]] == ["overall", "easy", "short", "hard", "long"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, r"x.jsonl, row 2: .*pred"),
        ({"pred": "x"}, r"x.jsonl, row 2: it needs outputs .* answers .* or answer"),
        ({"pred": "x", "answers": ["x"], "dataset": "none"}, r"row 2: LongBench has no data set"),
        ({"pred": "x", "outputs": ["x"]}, r"row 2: RULER has no task x"),
        ({"pred": "x", "answer": "A", "difficulty": "odd", "length": "short"}, r"row 2: .*odd"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", [LONGBENCH[0] | {"dataset": "qasper"}, row])
    with pytest.raises(ConfigError, match=message):
        score_file(path)


def test_files_without_rows_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="has no rows to score"):
        score_file(write(tmp_path / "x.jsonl", []))
    with pytest.raises(ConfigError, match="has no rows to score"):
        score_file(write(tmp_path / "x.jsonl", ["text"]))
    with pytest.raises(ConfigError, match="there is no"):
        score_file(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no records of a run"):
        score_file(tmp_path)
    broken = {"suite": "longbench", "method": "dense", "turn": "x"}
    with pytest.raises(ConfigError, match="rows that are no records of a run"):
        score_file(write(tmp_path / "x.jsonl", [broken]))


def test_a_task_that_is_no_name_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [LONGBENCH[0] | {"task": ["hotpotqa"]}])
    with pytest.raises(ConfigError, match="its task is a name"):
        score_file(path)
