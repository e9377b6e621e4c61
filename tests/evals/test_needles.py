"""Needles: what is asked stands in the text, and sparse caches go on as if they had read it."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from engine.cache import SequenceCache
from engine.decode import decode
from engine.engine import Engine
from engine.errors import ConfigError
from engine.method import PRESETS, Method, preset
from engine.prefill import prefill
from engine.rag.question import prompt
from engine.sparse.cache import SparseCache, pool_shape
from evals import needles as subject
from evals.needles import Context, Needles, ask, low_rank
from kvstore.pool.device import DeviceTier
from retrieval.select import Policy

TOKENS = 1024
SPARSE = [name for name in PRESETS if name != "dense"]


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("needle-smear", device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def document(engine):
    return Needles.build(engine, tokens=TOKENS, needles=8, seed=3)


@pytest.fixture(scope="module")
def context(engine, document):
    return Context(engine.model, document.context)


@pytest.fixture
def pool(engine):
    """Pools for a method, closed at the end: by then all caches must be."""
    made = []

    def make(method):
        made.append(DeviceTier(pool_shape(engine.model, method), 64 << 20))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


# prompts


@pytest.mark.parametrize("seed", range(5))
def test_a_document_holds_its_needles_and_has_the_length_asked_for(engine, seed):
    made = Needles.build(engine, tokens=4096, needles=32, seed=seed)
    assert 4080 <= len(made.context) <= 4096
    text = engine.tokenizer.decode(made.context)
    keys = {question.fact.key for question in made.questions}
    assert len(keys) == 32
    assert all(question.fact.statement in text for question in made.questions)


def test_context_and_question_are_the_prompt_that_the_engine_would_make(engine, document):
    text = engine.tokenizer.decode(document.context, skip_special_tokens=True)
    for question in document.questions:
        whole = prompt(engine, text, question.fact.question)
        assert [*document.context, *question.tokens] == whole
        assert question.answer_tokens == 3  # a space, and twice three digits


def test_a_document_is_known_by_its_seed(engine, document):
    assert Needles.build(engine, tokens=TOKENS, needles=8, seed=3) == document
    assert Needles.build(engine, tokens=TOKENS, needles=8, seed=4) != document


def test_too_many_needles_for_a_text_are_an_error(engine):
    with pytest.raises(ConfigError, match="room"):
        Needles.build(engine, tokens=200, needles=32, seed=0)


# answers


def test_dense_answers_are_those_of_the_engine(engine, document, context):
    prompts = [[*document.context, *question.tokens] for question in document.questions]
    answers = engine.generate(prompts, max_new_tokens=3)
    want = [q.fact.answered_by(a.text) for q, a in zip(document.questions, answers)]
    score = ask(engine, context, document.questions, Method())
    assert score.right == tuple(want)
    assert sum(want) >= 7
    assert score.attended is None


def test_an_answer_with_one_wrong_digit_is_wrong(engine, document, context):
    def changed(question):
        digit = str((int(question.fact.value[-1]) + 1) % 10)
        return replace(
            question, fact=replace(question.fact, value=question.fact.value[:-1] + digit)
        )

    right = ask(engine, context, document.questions, Method()).right
    wrong = ask(engine, context, [changed(q) for q in document.questions], Method()).right
    assert any(right)
    assert not any(wrong)


@pytest.mark.parametrize("method", [Method(), preset("headrace", budget=100)])
def test_a_question_is_answered_alike_alone_and_among_longer_ones(
    engine, document, context, method, monkeypatch
):
    """In batches of three, one of them with a question that takes longer to ask."""
    ask_longer = engine.tokenizer(" Now tell me.", add_special_tokens=False)["input_ids"]
    first, second, *rest = document.questions[:4]
    mixed = [first, replace(second, tokens=(*ask_longer, *second.tokens)), *rest]
    alone = [ask(engine, context, [question], method).right[0] for question in mixed]
    monkeypatch.setattr(subject, "BATCH", 3)
    assert list(ask(engine, context, mixed, method).right) == alone


def test_every_method_attends_to_its_budget(engine, document, context):
    for name in SPARSE:
        score = ask(engine, context, document.questions[:1], preset(name, budget=60, rank=48))
        assert score.attended == 60


def test_the_default_finds_what_a_window_does_not(engine, document, context):
    method = preset("headrace", budget=0.05)
    budget = method.tokens(context.length)
    questions = document.questions[::2]
    window = ask(engine, context, questions, method, Policy(budget, 4, budget - 4))
    assert window.attended == budget
    assert sum(window.right) <= 1
    right = ask(engine, context, questions, method).right
    assert right == ask(engine, context, questions, Method()).right
    assert sum(right) >= 3


# caches


@torch.inference_mode()
def logits(engine, cache, question):
    rows = [decode(engine.model, [cache], torch.tensor([token])) for token in question.tokens]
    return torch.cat(rows)


def as_read(engine, document, method, pool):
    """A cache that read the text itself, the way the engine does."""
    cache = SparseCache(engine.model, TOKENS + 64, method, pool)
    prefill(engine.model, cache, torch.tensor(document.context))
    with torch.inference_mode():
        cache.finalize()
    return cache


METHODS = [preset(name, budget=80, rank=48) for name in SPARSE]
METHODS += [preset("headrace", budget=80, rank=48, keys="lowrank", values="int4")]
METHODS += [preset("a2ats", budget=80, distance=64), preset("shadowkv", budget=400, rank=48)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.index}-{m.keys}-{m.budget}")
def test_a_cache_goes_on_as_if_it_had_read_the_text(engine, document, context, pool, method):
    """The second and third, too: what the first was asked is not in their indexes."""
    one, two, *_ = document.questions
    tier = pool(method)
    with closing(as_read(engine, document, method, tier)) as cache:
        want = logits(engine, cache, one)
    with closing(context.sparse(method, tier)) as first:
        torch.testing.assert_close(logits(engine, first, one), want, rtol=0, atol=1e-4)
        with closing(context.sparse(method, tier)) as second:
            logits(engine, second, two)
            with closing(context.sparse(method, tier)) as third:
                torch.testing.assert_close(logits(engine, third, one), want, rtol=0, atol=1e-4)


def test_dense_copies_do_not_share_what_they_are_asked(engine, document, context):
    one, two, *_ = document.questions
    fresh = SequenceCache(engine.model.shape, TOKENS + 64)
    prefill(engine.model, fresh, torch.tensor(document.context))
    want = logits(engine, fresh, one)
    logits(engine, context.dense(32), two)
    torch.testing.assert_close(logits(engine, context.dense(32), one), want, rtol=0, atol=1e-4)


# ranks


@torch.inference_mode()
def test_unrotated_keys_are_what_the_layer_projects(engine, document, context):
    x = engine.model.embed(torch.tensor(document.context[:300]))
    want = engine.model.layers[0].qkv(x).k
    torch.testing.assert_close(context.unrotated(0, 300), want, rtol=0, atol=1e-4)


def test_a_rank_is_the_least_whose_error_is_tolerated(engine, document):
    ranks = (16, 32, 64, 96, 128)
    choices = low_rank(engine, document, ranks, 0.15)
    assert len(choices) == 4
    for layer, (rank, error) in enumerate(choices):
        assert error <= 0.15
        lower = [r for r in ranks if r < rank]
        assert all(low_rank(engine, document, [r], 0.15)[layer].error > 0.15 for r in lower)


def test_keys_of_full_rank_lose_nothing(engine, document):
    assert all(error < 1e-4 for _, error in low_rank(engine, document, [128], 0.0))
