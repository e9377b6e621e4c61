"""Runs: planned, gone on with after any end, and refused where the folder is of another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from engine.engine import Engine
from engine.errors import ConfigError
from evals import registry
from evals.folder import RUN, facts, open_folder
from evals.record import NO_CONTEXT, RECORDS, Journal, read_records
from evals.run import Run, plan
from evals.ways import ways
from tests.evals import toy
from tests.evals.toy import settings

ROOT = Path(__file__).parents[2]
MEASURED = ("prefill_s", "ttft_s", "decode_tok_s", "peak_mem")


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(registry.SUITES, "toy", toy.KIND)
    monkeypatch.delenv("HEADRACE_DATA", raising=False)


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("needle-tiny", device="cpu") as made:
        yield made


def run(engine, folder, asked, stop_after=None):
    """The steps that were made, new ones first."""
    with closing(open_folder(folder, facts(engine, asked))) as journal:
        made = Run(engine, journal, plan(asked), ways(asked), asked.limit)
        steps = made.steps()
        taken = [next(steps) for _ in range(stop_after)] if stop_after else list(steps)
        if stop_after is None:
            assert sum(step.tokens for step in taken) == made.tokens
        steps.close()
    return [step for step in taken if step.new]


def test_single_heads_are_measured_where_that_is_asked_for(engine, tmp_path):
    asked = settings(suite=("fidelity:toy",), tasks=("single",), limit=1, per_head=True)
    with closing(open_folder(tmp_path, facts(engine, asked))) as journal:
        list(Run(engine, journal, plan(asked), ways(asked), 1, asked.per_head).steps())
        found = journal.records
    assert all("recall/L3/H1" in record.measures for record in found)
    with pytest.raises(ConfigError, match="per_head is None, was true"):
        run(engine, tmp_path, settings(suite=("fidelity:toy",), tasks=("single",), limit=1))


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
    """The folder of a run that has ended; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.SUITES, "toy", toy.KIND)
        folder = tmp_path_factory.mktemp("whole")
        run(engine, folder, settings())
    return folder


@pytest.fixture
def ended(whole, tmp_path):
    """A copy of that."""
    return shutil.copytree(whole, tmp_path / "ended")


def settled(folder):
    """What a run found, without what a clock or the machine said."""
    cleared = dict.fromkeys(MEASURED)
    found = {one.key: msgspec.structs.replace(one, **cleared) for one in read_records(folder)}
    return list(found.values())


# the plan


def test_a_run_asks_every_sample_in_every_way(whole):
    records = read_records(whole)
    ways_ = [("dense", None), ("headrace", 0.2), (NO_CONTEXT, None)]
    turns = [(f"toy/pairs/200/{i}", turn) for i in range(2) for turn in range(2)]
    turns += [(f"toy/single/200/{i}", 0) for i in range(2)]
    want = {(sample, turn, *way) for sample, turn in turns for way in ways_}
    assert {(x.id, x.turn, x.method, x.budget) for x in records} == want
    assert len(records) == len(want)
    dense = [x for x in records if x.method == "dense"]
    assert {x.score for x in dense} <= {0.0, 100.0}
    assert sum(x.score for x in dense) >= 500
    assert sum(x.score for x in records if x.method == NO_CONTEXT) == 0


@pytest.mark.parametrize(("method", "times"), [(("dense",), 0), (("dense", "quest"), 1)])
def test_no_sample_waits_for_what_sparse_steps_compile(
    engine, tmp_path, monkeypatch, method, times
):
    """It would count as that sample's time."""
    compiled = []
    monkeypatch.setattr("evals.run.compile_ahead", lambda: compiled.append(1))
    asked = settings(method=method)
    with closing(open_folder(tmp_path, facts(engine, asked))) as journal:
        list(Run(engine, journal, [], ways(asked), 1).steps())
    assert len(compiled) == times


def test_the_plan_has_the_tasks_and_lengths_that_are_asked_for():
    cells = plan(settings(tasks=("single",), lengths=(200, 300, 200)))
    assert [(cell.task, cell.length) for cell in cells] == [("single", 200), ("single", 300)]
    assert [cell.task for cell in plan(settings())] == ["pairs", "single"]


def test_every_method_has_every_budget():
    both = ways(settings(method=("headrace", "quest"), budget=(0.2, 64.0)))
    names = [(way.name, way.budget, way.method.budget) for way in both[1:]]
    assert names == [(m, b, b) for m in ("headrace", "quest") for b in (0.2, 64.0)]


def test_the_ways_begin_with_dense_once():
    both = ways(settings(method=("quest", "dense", "quest"), budget=(0.1, 0.1)))
    assert [(way.name, way.budget) for way in both] == [("dense", None), ("quest", 0.1)]


def test_settings_change_a_method():
    asked = settings(method=("shadowkv",), settings={"shadowkv": {"rank": 48}})
    assert ways(asked)[1].method.rank == 48


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(suite=("toys",)), "no suite 'toys'"),
        (dict(suite=("fidelity:toys",)), "no suite 'fidelity:toys'"),
        (dict(tasks=("single", "none")), "no task none; there are pairs, single"),
        (dict(method=("best",)), "no method 'best'"),
        (dict(budget=(10.0,)), "raise budget"),
        (dict(budget=()), "budget is missing"),
        (dict(settings={"quest": {}}), "quest, which does not run"),
        (dict(settings={"headrace": {"budget": 3}}), "has a budget"),
        (dict(settings={"headrace": {"index": "vq"}}), "name another method"),
        (dict(settings={"headrace": {"ranks": 3}}), "no setting ranks"),
        (dict(method=()), "method is missing"),
        (dict(limit=0), "limit must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_words(changes, said):
    def refused():
        asked = settings(**changes)
        return ways(asked), plan(asked)

    with pytest.raises(ConfigError, match=said):
        refused()


# going on


def test_what_is_there_is_not_asked_again(engine, ended):
    before = (ended / RECORDS).read_bytes()
    assert run(engine, ended, settings()) == []
    assert (ended / RECORDS).read_bytes() == before


def test_a_run_goes_on_where_it_was_ended(engine, whole, tmp_path):
    first = run(engine, tmp_path, settings(), stop_after=4)
    path = tmp_path / RECORDS
    path.write_bytes(path.read_bytes()[:-20])  # in the middle of a line
    rest = run(engine, tmp_path, settings())
    assert len(first) == 4
    assert 8 <= len(rest) <= 9
    assert settled(tmp_path) == settled(whole)


def test_a_turn_that_is_missing_is_asked_again_and_noted_once(engine, ended):
    path = ended / RECORDS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert len(run(engine, ended, settings())) == 1
    assert len(path.read_bytes().splitlines()) == len(lines)


def toy_process(folder):
    """The run of `settings()`, by a process of its own."""
    command = [sys.executable, "-m", "tests.evals.toy", "run", "--suite", "toy", "--limit", "2"]
    command += ["--method", "headrace", "--budget", "0.2", "--lengths", "200", "--json"]
    return subprocess.Popen(
        [*command, "--out", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_after(folder, lines):
    """A run that is killed as soon as it has so many records."""
    process, path = toy_process(folder), folder / RECORDS
    try:
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_is_killed_and_started_again_ends_alike(engine, whole, tmp_path):
    kill_after(tmp_path, lines=5)
    assert len(read_records(tmp_path)) < len(read_records(whole))
    process = toy_process(tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert settled(tmp_path) == settled(whole)
    assert json.loads(out) == {"out": str(tmp_path), "records": 18, "errors": 0}
    assert len(json.loads((tmp_path / RUN).read_bytes())["starts"]) == 2


# what fails


def test_a_length_that_is_impossible_is_an_error_and_the_run_goes_on(engine, tmp_path):
    run(engine, tmp_path, settings(lengths=(100, 200), tasks=("single",), limit=1))
    first, *rest = read_records(tmp_path)
    assert (first.id, first.error) == ("toy/single/100", "toy needs 150 tokens, got 100")
    assert [x.length for x in rest] == [200] * 3
    assert not any(x.error for x in rest)


def test_what_failed_is_tried_again_and_then_is_no_failure(engine, tmp_path, monkeypatch):
    asked = settings(lengths=(200,), tasks=("single",), limit=2)
    with monkeypatch.context() as patch:
        patch.setattr(toy.ToySuite, "samples", _no_samples)
        run(engine, tmp_path, asked)
    with monkeypatch.context() as patch:
        patch.setattr("evals.answer.reply", _no_memory)
        run(engine, tmp_path, asked)
    with closing(Journal(tmp_path)) as journal:
        assert journal.failures == 6
    run(engine, tmp_path, asked)
    with closing(Journal(tmp_path)) as journal:
        assert journal.failures == 0
        assert len([x for x in journal.records if x.score is not None]) == 6


def _no_samples(*_):
    raise ConfigError("there is no data")
    yield


def _no_memory(*_):
    raise MemoryError("there is no memory")


# measurements


@pytest.mark.parametrize("name", ["fidelity", "speed"])
def test_measurements_take_the_samples_of_a_suite(engine, tmp_path, name):
    asked = settings(suite=(f"{name}:toy",), tasks=("pairs",), limit=1)
    run(engine, tmp_path, asked)
    records = read_records(tmp_path)
    want = {(turn, method) for turn in range(2) for method in ("dense", "headrace")}
    assert {(x.turn, x.method) for x in records} == want
    assert {(x.suite, x.id) for x in records} == {(name, "toy/pairs/200/0")}
    assert all(x.measures and x.error is None for x in records)
    assert run(engine, tmp_path, asked) == []


def test_a_measurement_that_fails_is_an_error_of_all_its_ways(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("evals.fidelity.measure", _no_memory)
    run(engine, tmp_path, settings(suite=("fidelity:toy",), tasks=("single",), limit=1))
    records = read_records(tmp_path)
    assert [(x.suite, x.error) for x in records] == [("fidelity", "there is no memory")] * 2
