"""Speed: what is timed, in which order, and what is made of the seconds."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from engine.cache import SequenceCache
from engine.config import EngineConfig
from engine.decode import decode
from engine.errors import ConfigError
from evals import speed as subject
from evals.context import Context
from evals.fidelity import dense_path
from evals.speed import Runner, measure, take_turns
from evals.ways import DENSE
from tests.evals.measured import make_engine, make_sample, make_trial, way

WAYS = [DENSE, way("headrace", 40), way("quest", 60)]
STEPS = 5


@pytest.fixture(scope="module")
def llama():
    with make_engine() as engine:
        yield engine


@pytest.fixture
def clock(monkeypatch):
    """A clock that decoding alone moves: by 6 s for dense, by 2 s more and more for others."""
    state = {"now": 0.0, "sparse": 2.0}

    def timed(model, caches, tokens):
        dense = isinstance(caches[0], SequenceCache)
        state["now"] += 6.0 if dense else state["sparse"]
        state["sparse"] += 0 if dense else 0.25
        return decode(model, caches, tokens)

    monkeypatch.setattr(subject, "decode", timed)
    monkeypatch.setattr(subject, "now", lambda _: state["now"])
    monkeypatch.setattr(subject, "_alone", lambda *_: 77)
    return state


def measured(engine, ways, sample=None, **settings):
    found = list(measure(engine, sample or make_sample(), ways, **({"steps": STEPS} | settings)))
    assert [record.error for record in found] == [None] * len(found)
    return found


def test_seconds_become_rates_and_ratios(llama, clock):
    """The question takes 3 steps of 2 s to 2.5 s, the answer five of 2.75 s to 3.75 s."""
    dense, sparse = measured(llama, WAYS[:2])
    assert dense.measures["step_ms"] == dense.measures["step_ms_p90"] == 6000
    assert dense.measures["question_s"] == 18
    assert dense.measures["speedup"] == 1
    assert dense.measures["index_s"] == 0
    assert dense.decode_tok_s == 1 / 6
    assert sparse.measures["step_ms"] == 3250
    assert sparse.measures["step_ms_p90"] == pytest.approx(3650)
    assert sparse.measures["question_s"] == 2 + 2.25 + 2.5
    assert sparse.measures["speedup"] == 6 / 3.25
    assert sparse.decode_tok_s == 1 / 3.25
    assert sparse.peak_mem == 77


def test_the_first_token_comes_after_prompt_index_and_question(llama):
    for record in measured(llama, WAYS):
        found = record.measures
        parts = record.prefill_s, found["index_s"], found["question_s"]
        assert record.ttft_s == pytest.approx(sum(parts))
        assert all(part > 0 for part in parts) or record.method == "dense"
        assert found["prefill_tok_s"] == pytest.approx(200 / record.prefill_s)
        assert 0 < found["step_ms"] <= found["step_ms_p90"]


def test_records_say_what_was_measured(llama):
    sample = make_sample(questions=[(5, 6, 7), (8, 9)])
    found = measured(llama, WAYS, sample)
    assert [(x.suite, x.turn, x.method, x.budget) for x in found] == [
        ("speed", turn, one.name, one.budget) for turn in (0, 1) for one in WAYS
    ]
    assert [x.kept_tokens for x in found] == [204.5, 40, 60, 204, 40, 60]
    assert [x.prompt_tokens for x in found] == [203] * 3 + [202] * 3
    assert all(x.bytes_moved > 0 for x in found)


def test_every_round_another_method_begins_and_each_has_its_turn(llama, monkeypatch):
    order = []

    def noted(model, caches, tokens):
        order.append(id(caches[0]))
        return decode(model, caches, tokens)

    monkeypatch.setattr(subject, "_alone", lambda *_: None)
    monkeypatch.setattr(subject, "decode", noted)
    measured(llama, WAYS)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 3 + STEPS
    assert all(sorted(x) == sorted(rounds[0]) for x in rounds)
    assert all(after == before[1:] + before[:1] for before, after in pairwise(rounds))


def test_each_method_hears_the_question_and_then_itself(llama, monkeypatch):
    trial = make_trial(llama)
    path = dense_path(llama.model, trial.context.dense(40), trial.question, 7)
    fed = []
    monkeypatch.setattr(
        subject, "decode", lambda m, c, tokens: (fed.append(int(tokens)), decode(m, c, tokens))[1]
    )
    for one in (DENSE, way("quest")):
        fed.clear()
        with trial.cache(one) as cache:
            take_turns(llama.model, [Runner(one, cache, None)], trial.question, 6)
        assert fed == list(path.tokens)


def test_dense_is_beside_the_others_whether_or_not_it_is_asked_for(llama, clock):
    [alone] = measured(llama, WAYS[1:2])
    assert alone.method == "headrace"
    assert alone.measures["speedup"] == 6 / 3.25


def test_peak_memory_leaves_out_what_other_methods_left(llama, monkeypatch):
    """In use: 100 before any cache, 130 before the second one, whose peak is 170."""
    readings = iter([100, 100, 150, 130, 170])
    monkeypatch.setattr(subject, "peak_bytes", lambda _: next(readings))
    assert [x.peak_mem for x in measured(llama, WAYS[:2])] == [150, 140]


def test_where_no_one_knows_the_peak_there_is_none(llama, monkeypatch):
    monkeypatch.setattr(subject, "peak_bytes", lambda _: None)
    assert [x.peak_mem for x in measured(llama, WAYS[:1])] == [None]


def test_the_peak_is_the_cache_and_what_a_step_takes(llama):
    """24 MB of KV, and half of it again in an index of all keys."""
    start = subject._in_use(torch.device("cpu"))
    if start is None:
        pytest.skip("this system does not say how much memory a process has")
    shape, length = llama.model.shape, 8000
    size = length * shape.kv_bytes_per_token
    context = Context(llama.model, make_trial(llama).asked.context)
    for layer in range(shape.num_layers):
        kv = torch.randn(2, length - 200, 64)
        context.write(layer, 200, kv, kv)
    context.advance(length - 200)
    trial = replace(make_trial(llama), context=context)
    torch.ones(6 << 20)  # once 24 MB were free, glibc takes less than that from its heap ...
    heap = [torch.ones(1 << 20) for _ in range(12)]
    heap = heap[-1:]  # ... and keeps 44 MB of it, which caches can take unseen
    start = subject._in_use(torch.device("cpu"))
    dense, oracle = (subject._alone(trial, x, start) for x in (DENSE, way("oracle", 40)))
    assert start + 0.95 * size < dense < start + 1.2 * size
    assert start + 1.4 * size < oracle < start + 2.0 * size
    assert heap


def test_a_method_that_fails_does_not_stop_the_others():
    with make_engine("mistral-window") as engine:
        quest, dense = measure(engine, make_sample(), [DENSE, way("quest", 40)], steps=2)
    assert "sliding window" in quest.error
    assert dense.error is None
    assert dense.measures["speedup"] == 1


def test_a_sample_that_cannot_be_asked_is_told_for_every_method():
    with make_engine(config=EngineConfig(cache_bytes=300_000)) as engine:
        found = list(measure(engine, make_sample(300), WAYS))
    assert [x.method for x in found] == ["dense", "headrace", "quest"]
    assert all("cache_bytes" in x.error for x in found)


@pytest.mark.parametrize("setting", ["steps", "question_tokens"])
def test_a_setting_out_of_range_is_named(llama, setting):
    with pytest.raises(ConfigError, match=setting):
        next(measure(llama, make_sample(), WAYS, **{setting: 0}))
