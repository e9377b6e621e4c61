"""Answers: the engine's own where nothing is left out, and what is counted beside them."""

from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.method import PRESETS, preset
from evals import answer as subject
from evals.answer import Answers
from evals.context import index_name
from evals.prompt import ask, ask_alone
from evals.record import NO_CONTEXT
from evals.task import Sample, Turn
from evals.ways import DENSE, FLOOR, Way
from tests.engine.families import build
from tests.evals.toy import make_sample

WHOLE = [Way(name, 4096.0, preset(name, budget=4096)) for name in PRESETS if name != "dense"]


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("needle-tiny", device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def sample(engine):
    return make_sample(engine.tokenizer, "pairs", 400, seed=5, number=0)


def changed(sample, **turn):
    return replace(sample, turns=tuple(replace(one, **turn) for one in sample.turns))


def reference(engine, sample, **options):
    """What the engine answers to the same prompts."""
    prompts = [[*one.context, *one.question] for one in ask(engine.tokenizer, sample)]
    done = [
        engine.generate(prompt, max_new_tokens=turn.max_new_tokens, stop=turn.stop, **options)[0]
        for prompt, turn in zip(prompts, sample.turns)
    ]
    return [one.text for one in done]


def texts(engine, sample, way):
    records = Answers(engine, sample).records(way)
    assert [record.error for record in records] == [None] * len(records)
    return [record.prediction for record in records]


@pytest.mark.parametrize("way", [DENSE, *WHOLE], ids=lambda way: way.name)
def test_with_the_whole_budget_answers_are_the_engines(engine, sample, way):
    said = texts(engine, sample, way)
    assert said == reference(engine, sample)
    assert all(turn.outputs[0] in text for turn, text in zip(sample.turns, said))


def test_long_answers_and_prefixes_too(engine, sample):
    longer = changed(sample, max_new_tokens=24, prefix=" surely", stop=())
    for way in (DENSE, WHOLE[0]):
        assert texts(engine, longer, way) == reference(engine, longer)


def test_an_answer_ends_before_a_stop_text(engine, sample):
    longer = changed(sample, max_new_tokens=24)
    [whole, _] = texts(engine, longer, DENSE)
    stop = whole[4:6]
    [cut, _] = texts(engine, changed(longer, stop=(stop,)), DENSE)
    assert cut == whole[: whole.index(stop)]


def test_an_answer_ends_with_the_models_own_end(engine, sample, monkeypatch):
    longer = changed(sample, max_new_tokens=24)
    [whole, _] = texts(engine, longer, DENSE)
    token = engine.tokenizer(whole, add_special_tokens=False)["input_ids"][1]
    monkeypatch.setattr(type(engine.model), "eos", frozenset([token]), raising=False)
    [cut, _] = texts(engine, longer, DENSE)
    assert whole.startswith(cut[:4])
    assert len(cut) < len(whole)


def test_the_context_is_read_once_for_all_methods_and_turns(engine, sample, monkeypatch):
    read = []
    original = subject.Context

    def counted(model, tokens):
        read.append(len(tokens))
        return original(model, tokens)

    monkeypatch.setattr(subject, "Context", counted)
    answers = Answers(engine, sample)
    for way in (DENSE, *WHOLE[:2]):
        assert len(answers.records(way)) == 2
    assert read == [len(ask(engine.tokenizer, sample)[0].context)]


@pytest.mark.parametrize("way", [DENSE, WHOLE[0]], ids=lambda way: way.name)
def test_turns_are_answered_alike_alone_and_together(engine, sample, way, monkeypatch):
    together = texts(engine, sample, way)
    monkeypatch.setattr(subject, "BATCH", 1)
    assert texts(engine, sample, way) == together


def test_a_turn_does_not_hear_what_another_asked(engine, sample):
    answers = Answers(engine, sample)
    first = [record.prediction for record in answers.records(WHOLE[0])]
    again = [record.prediction for record in answers.records(WHOLE[0])]
    assert first == again


def test_the_floor_is_the_question_without_its_context(engine, sample):
    records = Answers(engine, sample).records(FLOOR)
    for i, record in enumerate(records):
        alone = ask_alone(engine.tokenizer, sample, i)
        [want] = engine.generate([*alone.context, *alone.question], max_new_tokens=4)
        assert record.prediction == want.text
        assert record.method == NO_CONTEXT
        assert record.prompt_tokens == alone.tokens < 40
        assert record.prompt_sha256 == alone.sha256
        assert sample.turns[i].outputs[0] not in record.prediction


# what is counted


def test_dense_attends_to_everything_and_moves_it(engine, sample):
    [record, _] = Answers(engine, sample).records(DENSE)
    asked = ask(engine.tokenizer, sample)[0]
    steps = len(asked.question) + 3
    lengths = [len(asked.context) + i + 1 for i in range(steps)]
    assert record.kept_tokens == pytest.approx(sum(lengths) / steps)
    per_token = engine.model.shape.kv_bytes_per_token
    assert record.bytes_moved == pytest.approx(per_token * sum(lengths) / steps)
    assert record.index_bytes == 0
    assert record.budget is None


def test_a_method_attends_to_its_budget(engine, sample):
    shape = engine.model.shape
    for name in ("headrace", "quest", "oracle"):
        [record, _] = Answers(engine, sample).records(Way(name, 60.0, preset(name, budget=60)))
        assert record.kept_tokens == 60
        assert record.bytes_moved == 60 * shape.kv_bytes_per_token
        assert record.index_bytes > 0
    share = Way("headrace", 0.2, preset("headrace", budget=0.2))
    [record, _] = Answers(engine, sample).records(share)
    assert record.kept_tokens == round(0.2 * len(ask(engine.tokenizer, sample)[0].context))


def test_on_a_device_only_what_misses_is_moved(engine, sample):
    way = Way("headrace", 60.0, preset("headrace", budget=60, attend_on="device"))
    [record, _] = Answers(engine, sample).records(way)
    assert record.kept_tokens == 60
    assert 0 < record.bytes_moved < 60 * engine.model.shape.kv_bytes_per_token


def test_low_rank_keys_count_as_index(engine, sample):
    landmarks = preset("shadowkv", budget=60, keys="exact")
    plain = Way("shadowkv", 60.0, landmarks)
    low = Way("shadowkv", 60.0, preset("shadowkv", budget=60, rank=48))
    [cheap, _] = Answers(engine, sample).records(plain)
    [dear, _] = Answers(engine, sample).records(low)
    row = 48 * engine.model.shape.dtype.itemsize / engine.model.shape.num_kv_heads
    assert dear.index_bytes - cheap.index_bytes > row


def test_records_say_what_was_asked_and_how_long_it_took(engine, sample):
    answers = Answers(engine, sample)
    both = [answers.records(way) for way in (DENSE, WHOLE[0])]
    asked = ask(engine.tokenizer, sample)
    for records in both:
        for i, record in enumerate(records):
            assert (record.id, record.turn, record.score) == (sample.id, i, None)
            assert record.prompt_tokens == asked[i].tokens
            assert record.prompt_sha256 == asked[i].sha256
            assert record.outputs == sample.turns[i].outputs
            assert 0 < record.prefill_s < record.ttft_s
            assert record.decode_tok_s > 0
            assert record.peak_mem is None or record.peak_mem > 1 << 20
    assert both[0][0].prefill_s == both[1][1].prefill_s


def test_the_first_token_waits_for_context_and_index(engine, sample):
    answers = Answers(engine, sample)
    way = WHOLE[0]
    answers.records(way)
    answers.context.prefill_s = 1000.0
    answers.context.build_s[index_name(way.method)] = 100.0
    assert all(1100 < record.ttft_s < 1200 for record in answers.records(way))
    assert all(1000 < record.ttft_s < 1100 for record in answers.records(DENSE))


@pytest.mark.parametrize("way", [DENSE, WHOLE[0]], ids=lambda way: way.name)
def test_peak_memory_is_without_that_of_reading_whoever_is_first(engine, sample, monkeypatch, way):
    order, read = [], subject.Context

    def context(model, tokens):
        order.append("read")
        return read(model, tokens)

    monkeypatch.setattr(subject, "Context", context)
    monkeypatch.setattr(subject, "reset_peak", lambda device: order.append("reset"))
    answers = Answers(engine, sample)
    answers.records(way)
    assert order == ["read", "reset"]
    answers.records(DENSE)
    assert order == ["read", "reset", "reset"]


def test_what_one_method_took_to_build_is_not_counted_for_another(engine, sample):
    answers = Answers(engine, sample)
    first, oracle = (next(way for way in WHOLE if way.name == x) for x in ("headrace", "oracle"))
    answers.records(first)
    assert list(answers.context.build_s) == [index_name(first.method)]
    answers.records(oracle)
    assert answers.context.build_s.keys() == {index_name(x.method) for x in (first, oracle)}


def test_one_token_has_no_rate(engine, sample):
    [record, _] = Answers(engine, changed(sample, max_new_tokens=1)).records(DENSE)
    assert record.decode_tok_s is None


# models with layers that do not select


@pytest.mark.parametrize("family", ["gemma3", "mistral-window"])
def test_layers_with_windows_stay_dense_and_are_not_counted(engine, family):
    """Random models: one with two such layers of four, one with no other."""
    with Engine(build(family), engine.tokenizer) as small:
        turn = Turn(" b b", "", ("c",), 12)
        text = "a a a b a b c a b c d " * 6
        sample = Sample("s/t/1/0", "s", "t", "f", 1, text, (turn,), chat=False)
        vocab = small.model.shape.vocab
        ids = [
            3 + token % (vocab - 3)
            for one in ask(engine.tokenizer, sample)
            for token in one.context
        ]
        asked = subject.Asked(tuple(ids), (7, 8))
        answers = Answers(small, sample)
        answers.__dict__["asked"] = [asked]
        [record] = answers.records(Way("headrace", 4096.0, preset("headrace", budget=4096)))
        [want] = small.generate([*asked.context, *asked.question], max_new_tokens=12)
        assert record.error is None
        assert record.prediction == want.text
        if family == "gemma3":
            steps = len(want.tokens) + 1
            assert record.kept_tokens == pytest.approx(len(ids) + (steps + 1) / 2)
        else:
            assert record.kept_tokens is None


# what cannot be asked


def errors(engine, sample, way):
    records = Answers(engine, sample).records(way)
    assert [record.turn for record in records] == list(range(len(sample.turns)))
    assert len({record.error for record in records}) == 1
    assert records[0].prediction == ""
    return records[0].error


def test_a_prompt_beyond_the_models_positions_is_an_error_of_its_records(engine, sample):
    long = replace(sample, context=" word" * 33_000)
    for way in (DENSE, WHOLE[0]):
        assert "32768 positions" in errors(engine, long, way)


def test_answers_stop_at_the_last_position(engine, sample):
    [asked, _] = ask(engine.tokenizer, sample)
    short, shape = replace(sample, turns=sample.turns[:1]), engine.model.shape
    engine.model.shape = replace(shape, max_positions=asked.tokens + 1)
    try:
        [record] = Answers(engine, short).records(DENSE)
    finally:
        engine.model.shape = shape
    [whole] = Answers(engine, short).records(DENSE)
    assert record.error is None
    assert whole.prediction.startswith(record.prediction)
    assert len(record.prediction) < len(whole.prediction)


@pytest.mark.parametrize(("setting", "way"), [("cache_bytes", DENSE), ("pinned_bytes", WHOLE[0])])
def test_too_little_memory_is_an_error_that_names_the_setting(engine, sample, setting, way):
    engine.config, before = EngineConfig(**{setting: 1 << 20}), engine.config
    try:
        assert setting in errors(engine, sample, way)
    finally:
        engine.config = before


def test_what_fails_for_one_method_is_answered_by_the_next(engine, sample):
    answers = Answers(engine, sample)
    broken = Way("headrace", 60.0, preset("headrace", budget=60, options={"bits": 77}))
    assert all(record.error for record in answers.records(broken))
    assert not any(record.error for record in answers.records(WHOLE[0]))


def test_torch_without_memory_is_an_error_and_a_bug_is_not(engine, sample, monkeypatch):
    def fails(error):
        def raising(*_):
            raise error

        return raising

    monkeypatch.setattr(subject, "reply", fails(torch.OutOfMemoryError("no memory\nat all")))
    assert errors(engine, sample, DENSE) == "no memory at all"
    monkeypatch.setattr(subject, "reply", fails(KeyError("bug")))
    with pytest.raises(KeyError):
        Answers(engine, sample).records(DENSE)
