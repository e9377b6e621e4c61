"""`headrace-eval traces`: the table, its numbers, and what is wrong in one line."""

import json
from pathlib import Path

import pytest

from evals.cli import main
from evals.traces.read import trace
from evals.traces.table import measure
from kvstore.eviction import POLICIES

LINES = [[0, 1], [0, 2], [0, 1], [0, 2]]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"hash_ids": ids}) for ids in LINES]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


def test_rates_count_the_shared_block_or_not():
    made = measure(trace("x", LINES), ["lru"], [2, 3])
    found = {(x.policy, x.capacity): (x.hit_rate, x.hit_rate_unshared) for x in made.rates}
    assert made.shared == 1
    assert found["lru", 2] == (3 / 8, 0.0)
    assert found["belady", 2] == (4 / 8, 1 / 4)
    assert found["lru", 3] == found["belady", 3] == found["belady", None] == (5 / 8, 2 / 4)


def test_where_requests_share_all_there_is_no_rate_without():
    made = measure(trace("x", [[1], [1]]), ["fifo"], [1])
    assert [(x.hit_rate, x.hit_rate_unshared) for x in made.rates] == [(0.5, None)] * 3


def test_the_table_has_policies_down_and_capacities_across(folder, capsys):
    assert main(["traces", "--data", folder, "--capacity", "3", "2", "1k"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][-4:] == ["2", "3", "1,000", "all"]
    assert lines[2] == ["lru", "37.50", "62.50", "62.50"]
    assert [line[0] for line in lines[2:9]] == list(POLICIES)
    assert lines[9] == ["belady", "50.00", "62.50", "62.50", "62.50"]
    assert lines[10] == ["lru,", "without", "shared", "0.00", "50.00", "50.00"]


def test_a_traces_name_may_look_like_markup(folder, capsys):
    Path(folder, "chat.jsonl").rename(Path(folder, "a[bold].jsonl"))
    assert main(["traces", "--data", folder, "--policy", "lru", "--capacity", "2"]) == 0
    assert capsys.readouterr().out.startswith("a[bold]: 4 requests, ")


def test_json_has_a_line_for_each_trace(folder, capsys, monkeypatch, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "traces").symlink_to(folder)
    monkeypatch.setenv("HEADRACE_DATA", str(data))
    assert main(["traces", "--policy", "fifo", "--capacity", "2", "--limit", "2", "--json"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["trace"], line["requests"], line["distinct"], line["shared"]) == ("chat", 2, 3, 1)
    assert [x["policy"] for x in line["rates"]] == ["fifo", "belady", "belady"]


@pytest.mark.parametrize(("policies", "lines"), [("lru,", 2), ("lru,fifo", 1), ("lru,lru", 2)])
def test_policies_may_have_commas_between_them(folder, capsys, policies, lines):
    options = ["--trace", f"{folder}/chat.jsonl", "--capacity", "2", "--policy", policies, "--json"]
    assert main(["traces", *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.parametrize(("policy", "hits"), [*dict.fromkeys(POLICIES, 3).items(), ("belady", 4)])
def test_one_replay_of_one_trace_ends_with_its_rates_alone(folder, capsys, policy, hits):
    options = ["--trace", f"{folder}/chat.jsonl", "--capacity", "2", "--policy", policy, "--json"]
    assert main(["traces", *options]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {
        "hit_rate": hits / 8,
        "hit_rate_without_shared": (hits - 3) / 4,
        "accesses": 8,
    }


def test_several_replays_of_one_trace_have_one_line(folder, capsys):
    options = ["--trace", f"{folder}/chat.jsonl", "--policy", "lru", "arc", "--capacity", "2"]
    assert main(["traces", *options, "--json"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [x["policy"] for x in line["rates"]] == ["lru", "arc", "belady", "belady"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "mru"], "no policy 'mru': --policy takes lru, fifo, lfu"),
        (["--capacity", "0"], "--capacity must be 1 block or more"),
        (["--policy", "lru,none"], "no policy 'none'"),
        (["--limit", "0"], "--limit must be 1 request or more"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, options, words):
    assert main(["traces", "--data", folder, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_is_no_number_of_blocks_is_said_so(folder, capsys):
    with pytest.raises(SystemExit):
        main(["traces", "--data", folder, "--capacity", "1.5k"])
    assert "blocks are a number, like 3000 or 3k; got 1.5k" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data", "--trace"])
def test_a_trace_that_is_not_there_is_named(capsys, option):
    assert main(["traces", option, "/nowhere"]) == 1
    assert "no traces in /nowhere" in capsys.readouterr().err


def test_without_data_the_setting_is_named(capsys, monkeypatch):
    monkeypatch.delenv("HEADRACE_DATA", raising=False)
    assert main(["traces"]) == 1
    assert "give --trace FILE or --data DIR, or set HEADRACE_DATA" in capsys.readouterr().err
