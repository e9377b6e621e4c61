"""The needle benchmark says what it promises; the whole of it runs with few questions."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.method import preset

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_needles.py"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; what it needs stands beside it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_needles", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_needles", module)
    spec.loader.exec_module(module)
    return module


def result(bench, model, seed, tokens, right, dense, attended=41.0):
    job = bench.Job(model, seed, bench.Setup(4096, 32, 2, len(right)), ("headrace",), (0.01,))
    cells = {
        ("dense", 1.0): bench.Cell(dense, float(tokens)),
        ("headrace", 0.01): bench.Cell(right, attended),
    }
    return bench.Result(job, tokens, 96, 0.08, cells)


def test_shares_are_over_all_documents_and_by_model(bench):
    results = [
        result(bench, "a", 0, 4096, (True, False), (True, True)),
        result(bench, "a", 1, 4090, (True, True), (True, False), attended=43.0),
        result(bench, "b", 0, 4093, (False, False), (True, True)),
    ]
    assert bench.summary(results) == {
        "a": {"headrace": {"0.01": 0.75}, "dense": 0.75},
        "b": {"headrace": {"0.01": 0.0}, "dense": 1.0},
        "context_tokens": 4093,
    }
    record = bench.record(results, 7.4)
    assert record["seconds"] == 7
    assert record["models"]["a"]["seeds"] == [0, 1]
    cell = record["models"]["a"]["cells"][1]
    assert cell == {
        "method": "headrace", "budget": 0.01, "attended": 42.0, "right": 3, "asked": 4
    }  # fmt: skip
    json.dumps(record)


def test_a_table_shows_shares_and_tokens_side_by_side(bench, capsys):
    bench.show([result(bench, "a", 0, 4096, (True, False), (True, True))])
    out = capsys.readouterr().out
    assert "0.50 (41)" in out
    assert "dense 1.00" in out
    assert "96 of 128" in out


def test_budgets_have_the_names_that_checks_expect(bench):
    names = ["0.005", "0.01", "0.02", "0.05", "0.10"]
    assert [bench.budget_name(budget) for budget in bench.BUDGETS] == names
    assert bench.budget_name(0.015) == "0.015"


def test_the_window_row_has_the_budget_of_all_others_and_chooses_nothing(bench):
    for budget in bench.BUDGETS:
        method = bench.settings("window", budget, None)
        policy = bench.window_only(method, 4096)
        assert policy.budget == preset("headrace", budget=budget).tokens(4096)
        assert policy.budget == policy.sinks + policy.window


def test_only_what_asks_for_it_gets_the_rank_that_was_chosen(bench):
    ranks = {name: bench.settings(name, 0.01, 80).rank for name in bench.SETTINGS}
    assert {name for name, rank in ranks.items() if rank == 80} == {
        "shadowkv",
        "lowrank+scalar+int4",
    }
    assert ranks["rank 20"] == 20


def test_the_questions_asked_are_spread_over_the_text(bench):
    assert bench.spread(range(32), 4) == [0, 8, 16, 24]
    assert bench.spread(range(8), 8) == list(range(8))
    assert len(set(bench.spread(range(32), 20))) == 20


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--budgets", "1.5"], "between 0 and 1"), (["--questions", "-1"], "at least 1")],
)
def test_options_out_of_range_are_refused(bench, monkeypatch, capsys, words, named):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_needle_benchmark_ends_with_one_json_line():
    run = [sys.executable, SCRIPT, "--json", "--quick", "--models", "needle-smear"]
    run += ["--budgets", "0.01", "0.1", "--methods", "window", "headrace", "rank 48"]
    run += ["--questions", "4"]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    numbers = json.loads(out.splitlines()[-1])
    assert set(numbers) == {"needle-smear", "context_tokens"}
    assert 4080 <= numbers["context_tokens"] <= 4096
    shares = numbers["needle-smear"]
    assert set(shares) == {"window", "headrace", "rank 48", "dense"}
    assert shares["headrace"] == {"0.01": shares["dense"], "0.10": shares["dense"]}
    assert shares["window"]["0.01"] == 0
