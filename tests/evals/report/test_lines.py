"""Scores beside dense: pairing, the gate, families, and what is missing."""

import random

import pytest

from evals.report.cells import DENSE, Asked, cells_of
from evals.report.lines import cell_lines, family_lines, judged
from tests.evals.report.make import floor, record, records

GOOD = [100.0] * 8 + [0.0] * 2  # dense, 80 on average


def lines(made):
    return cell_lines(judged(cells_of(made)))


def families(made, **how):
    return family_lines(judged(cells_of(made)), **how)


def only(found):
    assert len(found) == 1
    return found[0]


def test_a_score_is_the_mean_and_stands_beside_dense():
    line = only(lines(records("dense", GOOD) + records("quest", [100.0] * 4 + [0.0] * 6, 0.05)))
    assert line.reason is None
    score = line.of(Asked("quest", 0.05))
    assert (score.score, score.dense, score.difference) == (40.0, 80.0, -40.0)
    assert score.low < -40 < score.high < 0
    assert (score.samples, score.tried, score.cells) == (10, 10, 1)


def test_scores_equal_to_denses_differ_by_an_interval_of_no_width():
    line = only(lines(records("dense", GOOD) + records("headrace", GOOD, 0.016)))
    score = line.of(Asked("headrace", 0.016))
    assert (score.difference, score.low, score.high) == (0.0, 0.0, 0.0)


def test_pairing_is_by_sample_and_not_by_the_order_of_records():
    made = records("dense", GOOD) + records("headrace", GOOD, 0.016)
    random.Random(0).shuffle(made)
    score = only(lines(made)).of(Asked("headrace", 0.016))
    assert (score.low, score.high) == (0.0, 0.0)


def test_samples_that_differ_have_an_interval_even_if_the_means_are_equal():
    made = records("dense", [100.0, 0.0] * 5) + records("quest", [0.0, 100.0] * 5, 0.05)
    score = only(lines(made)).of(Asked("quest", 0.05))
    assert score.difference == 0.0
    assert score.low < -30
    assert score.high > 30


def test_the_lines_are_the_same_for_records_in_any_order():
    made = [
        each
        for length in (4096, 8192)
        for task in ("b", "a")
        for method, budget in (("dense", None), ("quest", 0.05), ("headrace", 0.016))
        for each in records(
            method, GOOD if budget is None else [n * 10 * budget for n in range(10)], budget,
            task=task, length=length,
        )
    ]  # fmt: skip
    shuffled = made.copy()
    random.Random(1).shuffle(shuffled)
    assert lines(made) == lines(shuffled)
    assert families(made) == families(shuffled)


def test_only_samples_that_both_have_are_compared():
    quest = [0.0, None, 100.0, 100.0]  # a run that was killed, and a question that failed
    made = records("dense", [100.0, 100.0, 0.0, None]) + records("quest", quest, 0.05)
    made += [record(1, "quest", 0.05, None, error="no memory")]
    score = only(lines(made)).of(Asked("quest", 0.05))
    assert (score.samples, score.tried, score.errors) == (2, 4, 1)
    assert (score.score, score.dense, score.difference) == (50.0, 50.0, 0.0)


def test_dense_stands_on_all_samples_that_it_has():
    made = records("dense", [100.0, 100.0, 0.0, 0.0]) + records("quest", [100.0], 0.05)
    assert only(lines(made)).of(DENSE).score == 50.0


def test_one_sample_has_no_interval():
    made = records("dense", [100.0]) + records("quest", [0.0], 0.05)
    score = only(lines(made)).of(Asked("quest", 0.05))
    assert (score.difference, score.low, score.high) == (-100.0, None, None)


def test_turns_of_a_sample_are_one_sample():
    turns = [(number, turn) for number in range(4) for turn in range(5)]
    made = [
        record(number, method, budget, score, turn=turn)
        for method, budget in (("dense", None), ("quest", 0.05))
        for number, turn in turns
        for score in [100.0 if method == "dense" or number else 0.0]
    ]
    score = only(lines(made)).of(Asked("quest", 0.05))
    assert (score.samples, score.difference) == (4, -25.0)
    assert score.low <= -50  # 4 values, not 20


def test_a_turn_that_only_one_has_does_not_count():
    made = [record(0, turn=turn) for turn in range(2)]
    made += [record(0, turn=2, score=0.0), record(0, "quest", 0.05, 100.0, turn=0)]
    score = only(lines(made)).of(Asked("quest", 0.05))
    assert (score.score, score.dense) == (100.0, 100.0)


def test_kept_tokens_and_index_bytes_are_means():
    made = records("dense", GOOD)
    made += [
        record(n, "quest", 0.05, 0.0, kept_tokens=100.0 + n, index_bytes=4.0) for n in range(3)
    ]
    score = only(lines(made)).of(Asked("quest", 0.05))
    assert (score.kept_tokens, score.index_bytes) == (101.0, 4.0)


def test_what_a_family_kept_is_the_mean_of_its_cells_however_many_samples_each_has():
    made = records("dense", GOOD) + records("dense", GOOD, length=8192)
    made += [record(0, "quest", 0.05, kept_tokens=100.0)]
    made += [record(n, "quest", 0.05, length=8192, kept_tokens=200.0) for n in range(9)]
    assert only(families(made)).of(Asked("quest", 0.05)).kept_tokens == 150.0


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (records("quest", GOOD, 0.05), "no dense score"),
        (records("dense", [100.0] * 2 + [0.0] * 8), "dense 20.0 is below 30"),
        (records("dense", GOOD) + records("no context", GOOD), "dense 80.0 is within noise of 80"),
        (records("dense", GOOD) + records("no context", [0.0] + [100.0] * 6 + [0.0] * 3), "noise"),
        (records("dense", GOOD) + floor(10), None),
        (records("dense", GOOD), None),  # a floor that was not run
        (records("dense", [100.0] * 3 + [0.0] * 7) + floor(10), "noise"),  # 0.7 ** 10 > 2.5 %
        (records("dense", [100.0] * 30 + [0.0] * 70) + floor(100), None),
        (records("dense", [100.0]) + floor(1), None),
        (records("dense", [100.0]) + records("no context", [100.0]), "noise"),
    ],
)
def test_the_gate(made, reason):
    found = only(lines(made)).reason
    assert found is None if reason is None else reason in found


def test_a_cell_that_is_not_discriminative_is_shown_and_not_averaged():
    good = records("dense", GOOD, task="a") + records("quest", [0.0] * 10, 0.05, task="a")
    bad = records("dense", [0.0] * 10, task="b") + records("quest", [100.0] * 10, 0.05, task="b")
    shown = lines(good + bad)
    assert [line.task for line in shown] == ["a", "b"]
    assert shown[1].of(Asked("quest", 0.05)).score == 100.0
    family = only(families(good + bad))
    assert (family.cells, family.left_out, family.reason) == (1, 1, None)
    assert family.of(Asked("quest", 0.05)).difference == -80.0


def test_a_family_without_a_good_cell_has_no_score():
    made = records("dense", [0.0] * 4)
    assert only(families(made)).reason == "dense 0.0 is below 30"
    family = only(families(made + records("dense", [0.0] * 4, length=8192)))
    assert family.reason == "none of its 2 cells is"
    assert family.scores == ()


def test_families_and_suites_stand_apart():
    made = records("dense", GOOD) + records("dense", GOOD, family="tracing", task="vt")
    made += records("dense", GOOD, suite="needle")
    found = [(line.suite, line.family) for line in families(made)]
    assert found == [("needle", "single needle"), ("ruler", "single needle"), ("ruler", "tracing")]


def test_cells_of_a_family_have_the_same_weight_whatever_their_samples():
    small = records("dense", [100.0] * 2, task="a") + records("quest", [0.0] * 2, 0.05, task="a")
    large = records("dense", [100.0] * 50, task="b") + records(
        "quest", [100.0] * 50, 0.05, task="b"
    )
    score = only(families(small + large)).of(Asked("quest", 0.05))
    assert (score.difference, score.samples, score.cells) == (-50.0, 52, 2)
    assert (score.low, score.high) == (-50.0, -50.0)  # no sample differs from its cell's others


def test_an_average_over_independent_cells_is_known_better_than_one_cell():
    made = [
        each
        for task in "abcd"
        for each in records("dense", [100.0] * 20, task=task)
        + records("quest", [0.0, 100.0] * 10, 0.05, task=task)
    ]
    family, cell = only(families(made)), lines(made)[0]
    of_family, of_cell = family.of(Asked("quest", 0.05)), cell.of(Asked("quest", 0.05))
    ratio = (of_family.high - of_family.low) / (of_cell.high - of_cell.low)
    assert 0.4 < ratio < 0.6  # 1 / sqrt(4)


def test_an_average_over_lengths_is_known_no_better_where_the_same_samples_fail_at_each():
    made = [
        each
        for length in (1024, 2048, 4096, 8192)
        for each in records("dense", [100.0] * 20, length=length)
        + records("quest", [0.0, 100.0] * 10, 0.05, length=length)
    ]
    family, cell = only(families(made)), lines(made)[0]
    of_family, of_cell = family.of(Asked("quest", 0.05)), cell.of(Asked("quest", 0.05))
    assert (of_family.low, of_family.high) == (of_cell.low, of_cell.high)


def test_families_by_length():
    made = records("dense", GOOD) + records("dense", [100.0] * 4, length=8192)
    found = families(made, by_length=True)
    assert [(line.length, line.of(DENSE).score) for line in found] == [(4096, 80.0), (8192, 100.0)]


def test_a_length_of_nothing_is_a_length():
    cells = cells_of([*records("dense", [100.0, 100.0], length=0), *floor(2, length=0)])
    assert [line.length for line in family_lines(judged(cells), by_length=True)] == [0]
    assert [line.length for line in family_lines(judged(cells))] == [None]


def test_methods_stand_in_the_order_of_tables_with_the_floor_last():
    made = floor(3) + records("zebra", [0.0] * 3, 0.1) + records("quest", [0.0] * 3, 0.1)
    made += records("headrace", [0.0] * 3, 0.1) + records("headrace", [0.0] * 3, 0.05)
    made += records("dense", [100.0] * 3)
    found = [(each.method, each.budget) for each in only(lines(made)).scores]
    assert found == [
        ("dense", None), ("headrace", 0.05), ("headrace", 0.1), ("quest", 0.1), ("zebra", 0.1),
        ("no context", None),
    ]  # fmt: skip
