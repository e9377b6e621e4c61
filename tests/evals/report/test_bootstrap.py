"""The bootstrap: its known answers, and that it is the same everywhere."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evals.report.bootstrap import RESAMPLES, interval, resampled_means


@given(st.floats(-100, 100), st.integers(1, 60))
def test_identical_values_have_an_interval_of_no_width(value, count):
    low, high = interval(resampled_means(np.full(count, value), "x"))
    assert abs(low - value) < 1e-9
    assert abs(high - value) < 1e-9


def test_the_interval_is_that_of_the_binomial_it_draws_from():
    values = np.array([0.0, 1.0] * 50)
    low, high = interval(resampled_means(values, "coin"))
    assert abs(low - 0.40) <= 0.011  # 2.5 % quantile of Binomial(100, 1/2) / 100
    assert abs(high - 0.60) <= 0.011


def test_the_mean_of_resampled_means_is_the_mean_within_its_own_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 200)
    means = resampled_means(values, "normal")
    assert means.shape == (RESAMPLES,)
    assert abs(means.mean() - values.mean()) < 5 * values.std() / np.sqrt(200 * RESAMPLES)
    assert abs(means.std() - values.std() / np.sqrt(200)) < 0.05 * values.std() / np.sqrt(200)


def test_a_constant_added_to_all_values_moves_the_interval_by_it():
    values = np.array([0.0, 10.0, 50.0, 100.0])
    low, high = interval(resampled_means(values, "x"))
    moved = interval(resampled_means(values + 7, "x"))
    assert np.allclose(moved, (low + 7, high + 7))


def test_names_are_seeds():
    values = np.arange(20.0)
    assert np.array_equal(resampled_means(values, "a"), resampled_means(values, "a"))
    assert not np.array_equal(resampled_means(values, "a"), resampled_means(values, "b"))


def test_draws_are_the_same_in_every_process():
    code = (
        "import numpy as np; from evals.report.bootstrap import resampled_means as r;"
        "print(r(np.arange(9.0), 'n').sum().hex())"
    )
    run = [sys.executable, "-c", code]
    made = [
        subprocess.run(run, check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": s})
        for s in ("1", "2")
    ]
    assert made[0].stdout == made[1].stdout
    assert made[0].stdout.strip() == resampled_means(np.arange(9.0), "n").sum().hex()
