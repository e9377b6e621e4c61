"""Prompts of chunks, read in full and blended, by the model that comes along."""

import pytest
import torch

from engine.blend.repair import BlendConfig
from engine.engine import Engine
from engine.errors import PromptError
from evals.blended import answer, blended, in_full
from evals.rag import RagSuite, segments

SUITE = RagSuite()


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("needle-tiny", device="cpu", dtype=torch.float32) as made:
        yield made


@pytest.fixture(scope="module")
def sample(engine):
    return next(SUITE.samples(engine.tokenizer, "single-plain", 900, 1))


def config(policy="query", share=0.3):
    return BlendConfig(policy=policy, share=share, controller=False)


def test_a_share_of_one_is_the_full_prefill(engine, sample):
    with in_full(engine, sample) as full, blended(engine, sample, config(share=1.0)) as other:
        assert torch.allclose(full.logits, other.logits, atol=1e-4)
        assert abs(full.distance(other)) < 1e-7
        assert full.report is None
        assert other.report.charged == 1


def test_the_answer_is_that_of_the_reading(engine, sample):
    with in_full(engine, sample) as full:
        assert SUITE.score(sample, 0, answer(engine, full)) == 100
    with blended(engine, sample, config()) as other:
        assert SUITE.score(sample, 0, answer(engine, other)) == 100


def test_what_is_reused_makes_a_distance(engine, sample):
    with in_full(engine, sample) as full, blended(engine, sample, config("reposition")) as other:
        assert full.distance(other) > 1e-7
        p, q = (x.logits.double().softmax(-1) for x in (full, other))
        assert full.distance(other) == pytest.approx(float((p * (p / q).log()).sum()))


def test_a_full_prefill_leaves_nothing_to_reuse(engine):
    sample = next(RagSuite(5).samples(engine.tokenizer, "single-plain", 900, 1))
    with in_full(engine, sample):
        pass
    cut = segments(engine.tokenizer, sample)
    for missed in (len(cut.chunks), 0):  # computed by the first blend, found by the second
        with blended(engine, sample, config()) as reading:
            assert reading.report.missed == missed
            first = len(cut.chunks[0])
            rest = sum(map(len, cut.chunks)) - first
            assert reading.report.reused_tokens == rest


def test_a_prompt_beyond_the_model_is_refused(engine, sample, monkeypatch):
    shape = engine.model.shape
    monkeypatch.setattr(engine.model, "shape", type(shape)(*_shortened(shape)))
    with pytest.raises(PromptError, match="positions"), in_full(engine, sample):
        pass


def _shortened(shape):
    fields = {name: getattr(shape, name) for name in type(shape).__dataclass_fields__}
    return (fields | {"max_positions": 100}).values()
