"""Measures, costs, depths and errors, from records with known answers."""

import msgspec
import pytest

from evals.report.load import load_runs
from evals.report.summary import Summary, summarize
from tests.evals.report.make import folder, record, records


@pytest.fixture
def summary(tmp_path):
    return lambda made: summarize(load_runs([folder(tmp_path / "run", made)]))


def measured(number, recall, **more):
    made = {"suite": "fidelity", "score": None, "measures": {"recall": recall, "kl/L0/H1": 0.5}}
    return record(number, **{"method": "quest", "budget": 0.05} | made | more)


def test_measures_are_means_over_samples_with_their_interval(summary):
    found = summary([measured(number, value) for number, value in enumerate([0.5, 0.5, 0.8])])
    (group,) = found.measured
    assert (group.suite, group.method, group.budget) == ("fidelity", "quest", 0.05)
    mean = group.means["recall"]
    assert mean.mean == pytest.approx(0.6)
    assert mean.samples == 3
    assert 0.5 <= mean.low < 0.6 < mean.high <= 0.8
    assert found.cells == []


def test_measures_of_turns_are_averaged_within_their_sample(summary):
    made = [measured(0, 0.2, turn=0), measured(0, 0.4, turn=1), measured(1, 0.9)]
    (group,) = summary(made).measured
    assert group.means["recall"].mean == pytest.approx(0.6)


def test_measures_of_tasks_and_of_other_suites_samples_are_apart(summary):
    made = [measured(n, 0.1 * n, task=task) for task in ("one", "other") for n in range(2)]
    made += [msgspec.structs.replace(measured(0, 0.9, task="one"), id="needle/one/4096/0")]
    found = [(x.source, x.task, x.means["recall"].samples) for x in summary(made).measured]
    assert found == [("fidelity", "one", 2), ("fidelity", "other", 2), ("needle", "one", 1)]


def test_a_note_that_a_cell_is_fine_now_is_no_measurement(summary):
    note = measured(0, 0.0, method="dense", budget=None, measures={}, family="")
    assert len(summary([note, measured(1, 0.5)]).measured) == 1


def test_what_a_measurement_notes_stands_beside_it(summary):
    made = [measured(0, 0.2, kept_tokens=64.0, index_bytes=36.0, decode_tok_s=10.0)]
    means = summary(made).measured[0].means
    noted = ("kept_tokens", "index_bytes", "decode_tok_s")
    assert [means[name].mean for name in noted] == [64.0, 36.0, 10.0]
    assert "peak_mem" not in means


def test_costs_are_medians_and_the_largest_memory(summary):
    made = [
        record(n, ttft_s=float(n * n), peak_mem=n, prefill_s=None) for n in range(3)
    ]  # fmt: skip
    (cost,) = summary(made).costs
    assert (cost.ttft_s, cost.peak_mem, cost.prefill_s, cost.questions) == (1.0, 2, None, 3)


def test_errors_are_counted_by_kind_those_of_measurements_too(summary):
    made = records("dense", [100.0] * 3)
    made += [record(n, "quest", 0.05, None, error="no memory") for n in range(2)]
    made += [record(2, "quest", 0.05, None, error="too long")]
    made += [measured(0, 0.0, measures={}, error="no memory")]
    found = summary(made)
    assert [(each.suite, each.error, each.questions) for each in found.failures] == [
        ("fidelity", "no memory", 1), ("ruler", "no memory", 2), ("ruler", "too long", 1),
    ]  # fmt: skip
    assert [line.suite for line in found.cells] == ["ruler"]


def test_a_cell_in_which_all_failed_is_shown(summary):
    found = summary([record(0, score=None, error="too long")])
    (line,) = found.cells
    assert line.reason == "no dense score"
    assert line.scores[0].errors == 1


def test_samples_that_could_not_be_made_are_an_error_and_no_cell(summary):
    made = record("of none", score=None, error="4,096 tokens are too few", family="")
    found = summary([made, *records("dense", [100.0] * 2)])
    assert [line.family for line in found.cells] == ["single needle"]
    assert [each.error for each in found.failures] == ["4,096 tokens are too few"]


def test_depths_are_fields_of_a_heat_map(summary):
    made = [record(n, score=score, extra={"depth": 0.5}) for n, score in enumerate([100.0, 50.0])]
    made += [record(2, score=0.0, extra={"depth": 1}), record(3, extra={"depth": [0.1, 0.2]})]
    found = [(each.depth, each.score, each.questions) for each in summary(made).depths]
    assert found == [(0.5, 75.0, 2), (1.0, 0.0, 1)]


def test_depths_of_samples_that_have_each_their_own_share_rows(summary):
    made = [record(n, score=float(n), extra={"depth": n / 99}) for n in range(100)]
    found = summary(made).depths
    assert [round(each.depth, 3) for each in found] == [n / 10 for n in range(11)]
    assert sum(each.questions for each in found) == 100
    assert found[0].score == 2.0  # depths below 0.05: samples 0 to 4


def test_a_summary_is_json_that_reads_back(summary):
    found = summary([*records("dense", [100.0] * 3), measured(0, 0.5)])
    assert msgspec.json.decode(msgspec.json.encode(found), type=Summary) == found
