"""The demo: what it hides, what it asks, and that it does not show what did not happen."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import ConfigError, Engine
from engine.cli import main
from engine.commands import demo as command
from engine.config import EngineConfig
from engine.demo.demo import Answer, DemoError, Job, Outcome, Tier, check_cold, check_warm
from engine.demo.haystack import KEYS, Fact, Haystack
from engine.demo.process import ask, hide
from kvstore.config import StoreConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(store=StoreConfig(host_bytes=1 << 28))
    with Engine.from_pretrained("needle-tiny", config) as engine:
        yield engine


def test_a_demo_of_no_length_is_refused(engine):
    with pytest.raises(ConfigError, match="no room for 5 facts in 0 tokens"):
        hide(engine, tokens=20, facts=5, seed=0)


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 10))]
)
def test_every_fact_is_found_in_8k_tokens(engine, seed):
    haystack = hide(engine, tokens=8192, facts=5, seed=seed)
    answers = [ask(engine, haystack.text, fact) for fact in haystack.facts]
    assert all(8192 - 100 < answer.prompt_tokens <= 8192 for answer in answers)
    assert [answer.text.strip(" .") for answer in answers] == [f.value for f in haystack.facts]
    assert all(answer.cached_tokens > 8000 for answer in answers[1:])


def test_facts_lie_at_ends_of_sentences_all_over_the_text(engine):
    haystack = Haystack.build(engine.tokenizer, tokens=4096, facts=8, seed=3)
    places = [haystack.text.index(fact.statement) for fact in haystack.facts]
    assert places == sorted(places)
    assert all(haystack.text[place - 1] in ".!?" for place in places)
    assert places[0] < len(haystack.text) / 4
    assert places[-1] > len(haystack.text) * 3 / 4
    assert len(engine.tokenizer(haystack.text)["input_ids"]) <= 4096


def test_a_haystack_is_longer_than_the_pages_if_it_has_to(engine):
    haystack = Haystack.build(engine.tokenizer, tokens=400_000, facts=1, seed=0)
    assert 399_000 < len(engine.tokenizer(haystack.text)["input_ids"]) <= 400_000


def test_a_seed_makes_one_haystack_and_another_makes_another(engine):
    one, same, other = (
        Haystack.build(engine.tokenizer, tokens=1024, facts=5, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same
    assert one.text != other.text


def test_every_key_is_one_token(engine):
    keys = KEYS.split()
    assert len(keys) == len(set(keys)) == 40
    assert all(len(engine.tokenize(f" {key}")) == 1 for key in keys)


@pytest.mark.parametrize(("tokens", "facts"), [(8192, 0), (8192, 41), (100, 5), (0, 1)])
def test_an_impossible_haystack_is_refused(engine, tokens, facts):
    with pytest.raises(ConfigError, match="facts"):
        Haystack.build(engine.tokenizer, tokens=tokens, facts=facts, seed=0)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 314159.", True),
        ("It is 314159", True),
        ("314158", False),
        ("3141590", False),
        ("", False),
    ],
)
def test_an_answer_is_right_digit_for_digit(text, right):
    assert Fact("tiger", "314159").answered_by(text) is right


@pytest.mark.parametrize(
    ("options", "tokens", "times"),
    [(["--tokens", "2048"], 2048, 3), pytest.param([], 8192, 10, marks=pytest.mark.slow)],
)
def test_the_demo_answers_from_disk_in_a_new_process(tmp_path, options, tokens, times):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "demo", "--json", *options],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    shown = json.loads(line)
    assert shown["questions"] == shown["correct_cold"] == shown["correct_warm"] == 5
    assert tokens - 100 < shown["context_tokens"] <= tokens
    assert shown["ttft_ratio"] >= times
    assert shown["ttft_cold_s"] > shown["ttft_warm_s"] > 0
    assert shown["decode_tokens_per_s"] > 0
    assert shown["bytes"].keys() == {"host", "disk"}
    assert min(shown["bytes"].values()) > (tokens - 100) * 4096
    assert shown["disk_hits_warm"] >= shown["cached_tokens_warm"] // 64 > tokens // 64 - 3
    assert not list(temporary.glob("headrace-demo-*"))


def answer(**changes) -> Answer:
    same = dict(key="tiger", value="314159", text=" 314159.", right=True, prompt_tokens=600)
    same |= dict(cached_tokens=512, ttft_s=0.1, decode_s=0.1, new_tokens=4)
    return Answer(**same | changes)


def outcome(*answers: Answer, disk=None, host=None) -> Outcome:
    tiers = {
        "host": host or Tier(),
        "disk": disk or Tier(hits=8, reads=8),
    }
    return Outcome(list(answers), tiers, tiers)


def test_warm_from_memory_does_not_count():
    check_warm(outcome(answer()), 64)
    for disk in (Tier(hits=8, reads=0), Tier(hits=7, reads=8), Tier()):
        with pytest.raises(DemoError, match="not the disk tier"):
            check_warm(outcome(answer(), disk=disk), 64)
    with pytest.raises(DemoError, match="not the disk tier"):
        check_warm(outcome(answer(), host=Tier(reads=1)), 64)
    with pytest.raises(DemoError, match="not the disk tier"):
        check_warm(outcome(answer(cached_tokens=0)), 64)


def test_a_process_that_is_not_cold_does_not_count():
    with pytest.raises(DemoError, match="already has this text"):
        check_cold(outcome(answer(cached_tokens=64)))


@pytest.mark.parametrize("wrong", ["process 1", "process 2", "none"])
def test_one_wrong_answer_fails_the_demo(wrong, monkeypatch, capsys):
    def run(job: Job, name: str) -> Outcome:
        cached = 0 if name == "process 1" else 512
        return outcome(answer(cached_tokens=cached, right=name != wrong, text=" [/INST] 314150."))

    monkeypatch.setattr(command, "run_process", run)
    assert main(["demo"]) == (wrong != "none")
    shown = capsys.readouterr().out
    assert ("wrong: '[/INST] 314150.'" in shown) == (wrong != "none")


def test_a_process_that_dies_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"headrace: process 1 was killed by {signal.SIGKILL.name}"
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "no-such-model"], "process 1 failed: model not found"),
        (["--no-store"], "leave --no-store out"),
    ],
)
def test_what_the_demo_cannot_do_is_told_in_one_line(args, said, capsys):
    assert main(["demo", *args]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(said, shown.err.splitlines()[-1])
    assert "Traceback" not in shown.err
