"""Fidelity: nothing is lost at full budget, and below it what is lost is what is reported."""

import pytest
import torch

from engine.attention import attend_token_torch
from engine.config import EngineConfig
from engine.decode import decode
from engine.errors import ConfigError
from engine.method import PRESETS, preset
from engine.model.pieces import AttentionSpec
from engine.sparse.layer import SparseLayer
from evals.context import Context
from evals.fidelity import attention_measures, dense_path, follow, measure
from evals.observed import Kept, Observed, compare
from evals.trial import one_line
from evals.ways import DENSE, Way
from kvstore.block import LayerKV
from retrieval.select import Policy
from tests.evals.measured import make_engine, make_sample, make_trial, way

SPARSE = [name for name in PRESETS if name != "dense"]
FAMILIES = ["llama", "llama-mha-llama3", "llama-mqa-128", "gemma2", "gemma3"]


def measured(engine, ways, sample=None, **settings):
    settings = {"answer_tokens": 5} | settings
    found = list(measure(engine, sample or make_sample(), ways, **settings))
    assert [record.error for record in found] == [None] * len(found)
    return [record.measures for record in found]


@pytest.fixture(scope="module")
def llama():
    with make_engine() as engine:
        yield engine


# where nothing is lost


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_budget_every_method_is_dense(family):
    with make_engine(family) as engine:
        ways = [DENSE, *(way(name, rank=10_000) for name in SPARSE)]
        for found in measured(engine, ways, make_sample(100), answer_tokens=4):
            assert found["steps"] == 3 + 4 - 1
            assert abs(found["kl"]) < 1e-6
            assert found["top1"] == 1
            assert found["greedy_prefix"] == 4
            assert found["error"] < 1e-4
            assert found["mass"] == pytest.approx(1, abs=1e-5)
            assert found["recall"] == pytest.approx(1, abs=1e-5)


def test_in_bf16_full_budget_is_dense_to_the_dtype():
    with make_engine("qwen3", dtype=torch.bfloat16) as engine:
        ways = [DENSE, *(way(name, rank=10_000) for name in SPARSE)]
        for found in measured(engine, ways, make_sample(100), answer_tokens=4):
            assert found["kl"] < 0.01
            assert found["error"] < 0.02
            assert found["mass"] == pytest.approx(1, abs=1e-3)
            assert found["recall"] == pytest.approx(1, abs=1e-3)


# where something is


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_has_all_of_its_own_mass_and_loses_the_rest(family):
    with make_engine(family) as engine:
        few, more = measured(engine, [way("oracle", 40), way("oracle", 100)])
    assert few["recall"] == pytest.approx(1, abs=1e-5)
    assert more["recall"] == pytest.approx(1, abs=1e-5)
    assert few["mass"] < more["mass"] < 1
    assert few["error"] > more["error"] > 0
    assert few["kl"] > more["kl"] > 0


def test_a_random_choice_is_worse_than_the_oracle(llama, monkeypatch):
    [oracle] = measured(llama, [way("oracle", 60)])

    def random(self, _):
        generator = torch.Generator().manual_seed(1000 * self.rows._number + self.length)
        orders = torch.rand(2, self.length, generator=generator).argsort(-1)
        return orders[:, :60].sort(-1).values

    monkeypatch.setattr(SparseLayer, "select", random)
    [chance] = measured(llama, [way("headrace", 60)])
    assert chance["mass"] == pytest.approx(60 / 220, abs=0.1)
    assert chance["recall"] < 0.7
    assert chance["recall"] < oracle["recall"]
    assert chance["error"] > 1.3 * oracle["error"]
    assert chance["kl"] > oracle["kl"]
    assert chance["top1"] < oracle["top1"]


def test_what_is_kept_is_counted_by_the_definition():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(n, generator=generator) for n in ((6, 64), (2, 90, 64), (2, 90, 64)))
    out, tokens = torch.randn(6, 64, generator=generator), torch.tensor([[0, 7, 89], [1, 2, 3]])
    for spec in (AttentionSpec(0.125), AttentionSpec(0.5, softcap=20.0)):
        policy = Policy(50, sinks=1, window=1, top_p=0.5)
        kept = compare(q, out, tokens, LayerKV(k, v), spec, policy)
        want = attend_token_torch(q, k, v, spec)
        for head in range(2):
            group = slice(3 * head, 3 * head + 3)
            plain = q[group] @ k[head].mT * spec.scale
            scores = plain if spec.softcap is None else 20 * torch.tanh(plain / 20)
            probs = scores.softmax(-1)
            torch.testing.assert_close(kept.mass[head], probs[:, tokens[head]].sum(-1).mean())
            middle = int(plain.softmax(-1)[:, 1:-1].amax(0).argmax()) + 1
            torch.testing.assert_close(kept.best[head], probs[:, [0, middle, 89]].sum(-1).mean())
            off = (out - want)[group].norm(dim=-1) / want[group].norm(dim=-1)
            torch.testing.assert_close(kept.error[head], off.mean())


def test_the_oracle_takes_as_many_tokens_even_where_fewer_would_hold_its_share():
    q, k = torch.zeros(2, 64), torch.zeros(2, 90, 64)
    tokens = torch.arange(90).expand(2, -1)
    policy = Policy(90, sinks=1, window=1, top_p=0.1, least=1)
    kept = compare(q, q, tokens, LayerKV(k, k + 1), AttentionSpec(1.0), policy)
    torch.testing.assert_close(kept.best, torch.ones(2))


def test_means_are_over_steps_and_each_layer_and_head_has_its_own():
    mass = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.3, 0.4], [0.5, 0.6]]])
    kept = Kept(mass, torch.full_like(mass, 0.8), 2 * mass)
    found = attention_measures(kept, [1, 3], per_head=True)
    assert found["mass"] == pytest.approx(0.35)
    assert found["recall"] == pytest.approx(0.35 / 0.8)
    heads = {"L1/H0": 0.2, "L1/H1": 0.3, "L3/H0": 0.4, "L3/H1": 0.5}
    for at, want in heads.items():
        assert found[f"mass/{at}"] == pytest.approx(want)
        assert found[f"recall/{at}"] == pytest.approx(want / 0.8)
        assert found[f"error/{at}"] == pytest.approx(2 * want)


def test_distance_is_that_of_distributions_by_definition(llama):
    trial = make_trial(llama)
    path = dense_path(llama.model, trial.context.dense(40), trial.question, 5)
    with trial.cache(way("headrace", 40)) as cache, trial.cache(way("headrace", 40)) as again:
        found = follow(llama.model, cache, path)
        for i, token in enumerate(path.tokens):
            q = decode(llama.model, [again], torch.tensor([token]))[0].softmax(-1)
            p = path.logits[i].softmax(-1)
            kl = (p * (p / q).log()).sum()
            torch.testing.assert_close(found.kl[i], kl, rtol=1e-3, atol=1e-6)
            assert bool(found.same[i]) == (int(p.argmax()) == int(q.argmax()))


# what is fed


def test_the_path_is_the_question_and_the_answer_that_the_engine_gives(llama):
    trial = make_trial(llama)
    path = dense_path(llama.model, trial.context.dense(40), trial.question, 12)
    prompt = [*trial.asked.context, *trial.question]
    [answer] = llama.generate([prompt], max_new_tokens=12)
    assert list(path.tokens) == [*trial.question, *answer.tokens[:11]]
    assert int(path.logits[-1].argmax()) == answer.tokens[11]
    want = llama.logits([*prompt, *answer.tokens[:11]])[200:]
    torch.testing.assert_close(path.logits, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", [24, 60])
@torch.inference_mode()
def test_the_greedy_prefix_is_that_of_a_free_run(llama, budget):
    one = way("shadowkv", budget, rank=16)
    for seed in range(2):
        sample = make_sample(seed=seed)
        [found] = measured(llama, [one], sample, answer_tokens=12)
        trial = make_trial(llama, sample)
        path = dense_path(llama.model, trial.context.dense(40), trial.question, 12)
        dense = [*path.tokens[3:], int(path.logits[-1].argmax())]
        with trial.cache(one) as cache:
            fed, said = list(trial.question), []
            while len(said) < 12:
                logits = decode(llama.model, [cache], torch.tensor([fed.pop(0)]))
                if not fed:
                    said.append(int(logits[0].argmax()))
                    fed.append(said[-1])
        same = [a == b for a, b in zip(said, dense)]
        assert found["greedy_prefix"] == [*same, False].index(False)


@pytest.mark.parametrize("name", ["dense", "headrace"])
def test_who_is_observed_goes_on_as_before(llama, name):
    one, trial = DENSE if name == "dense" else way(name, 50, prefetch="layer"), make_trial(llama)
    path = dense_path(llama.model, trial.context.dense(40), trial.question, 9)
    rows = []
    for watch in (False, True):
        with trial.cache(one) as cache:
            seen = Observed(cache, trial.context.dense(40), [0, 1, 2]) if watch else cache
            with torch.inference_mode():
                steps = [decode(llama.model, [seen], torch.tensor([t])) for t in path.tokens]
            rows.append((torch.cat(steps), cache.length, cache.stats and cache.stats.selected))
    (plain, *rest), (watched, *same) = rows
    assert torch.equal(plain, watched)
    assert rest == same
    assert seen.kept.mass.shape == (11, 3, 2)


def test_methods_do_not_see_what_the_one_before_was_fed(llama):
    ways = [way("quest", 40), way("oracle", 40), way("quest", 40)]
    first, _, again = measured(llama, ways)
    assert first == again
    assert [first] == measured(llama, ways[:1])


def test_a_long_question_is_read_but_for_its_last_tokens(llama, monkeypatch):
    read = []
    init = Context.__init__
    monkeypatch.setattr(
        Context, "__init__", lambda self, model, t: (read.append(len(t)), init(self, model, t))[1]
    )
    sample = make_sample(100, questions=[(5, 6), range(3, 33), (9,), range(40, 70)])
    found = measured(llama, [DENSE], sample, answer_tokens=4, question_tokens=10)
    assert [x["steps"] for x in found] == [2 + 3, 10 + 3, 1 + 3, 10 + 3]
    assert read == [100, 120, 100, 120]
    read.clear()
    measured(llama, [DENSE], make_sample(100, questions=[(5, 6), (7,)]), answer_tokens=4)
    assert read == [100]  # for both


# records


def test_a_record_says_what_was_measured_and_on_which_tokens(llama):
    sample = make_sample(questions=[(5, 6, 7), (8, 9)])
    dense, first, _, second = measure(llama, sample, [DENSE, way("quest", 40)], answer_tokens=2)
    assert (dense.method, dense.budget, dense.kept_tokens) == ("dense", None, 200 + 2.5)
    assert (first.suite, first.id, first.method, first.budget) == (
        "fidelity", "sample", "quest", 40,
    )  # fmt: skip
    assert (first.turn, second.turn) == (0, 1)
    assert (first.prompt_tokens, second.prompt_tokens) == (203, 202)
    assert first.prompt_sha256 == dense.prompt_sha256 != second.prompt_sha256
    assert first.kept_tokens == 40
    assert first.index_bytes > 0
    assert first.bytes_moved > 0
    assert first.prefill_s > 0
    assert first.score is None


def test_layers_and_heads_are_told_apart_on_request():
    with make_engine("gemma3") as engine:
        plain, split = (measured(engine, [way("quest", 40)], per_head=x)[0] for x in (False, True))
    assert split.items() >= plain.items()
    for name in ("recall", "mass", "error"):
        heads = {f"{name}/L{layer}/H{head}" for layer in (1, 3) for head in range(2)}
        assert {x for x in split if x.startswith(f"{name}/")} == heads
        assert sum(map(split.__getitem__, heads)) / 4 == pytest.approx(plain[name], rel=1e-5)
        assert len(set(map(split.__getitem__, heads))) == 4


def test_a_method_whose_layers_are_all_dense_says_so(llama):
    layers = len(llama.model.layers)
    dense = Way("headrace", 32.0, preset("headrace", budget=32, dense_layers=layers))
    [record] = measure(llama, make_sample(), [dense])
    assert f"are among the first {layers}: lower dense_layers" in record.error
    assert "window" not in record.error


def test_a_model_whose_layers_all_have_windows_has_nothing_to_select():
    with make_engine("mistral-window") as engine:
        dense, sparse = measure(engine, make_sample(), [DENSE, way("quest", 40)])
    assert dense.measures == {"steps": 34, "kl": 0, "top1": 1, "greedy_prefix": 32}
    assert "sliding window" in sparse.error
    assert sparse.measures == {}


@pytest.mark.parametrize(
    ("sample", "config", "said"),
    [
        (make_sample(1000), EngineConfig(), "the model takes 1024"),
        (make_sample(0, questions=[(5,)]), EngineConfig(), "two tokens"),
        (make_sample(300), EngineConfig(cache_bytes=300_000), "cache_bytes is 300000"),
    ],
)
def test_a_sample_that_cannot_be_asked_is_told_for_every_turn_and_method(sample, config, said):
    with make_engine(config=config) as engine:
        found = list(measure(engine, sample, [DENSE, way("quest", 40)]))
    assert [record.method for record in found] == ["dense", "quest"]
    assert all(said in record.error and "\n" not in record.error for record in found)


def test_one_method_that_fails_does_not_stop_the_others():
    with make_engine(config=EngineConfig(pinned_bytes=600_000)) as engine:
        ways = [way("quest", 40), DENSE, way("shadowkv", 40, values="int4")]
        full, dense, small = measure(engine, make_sample(500), ways, answer_tokens=2)
    assert "pinned_bytes" in full.error
    assert dense.error is small.error is None


def test_a_fault_of_ours_is_no_line_in_a_record():
    with pytest.raises(RuntimeError, match="shapes"):
        one_line(RuntimeError("shapes differ"))
    assert one_line(RuntimeError("out of\nmemory")) == "out of memory"
    assert one_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("setting", ["answer_tokens", "question_tokens"])
def test_a_setting_out_of_range_is_named(llama, setting):
    with pytest.raises(ConfigError, match=setting):
        next(measure(llama, make_sample(), [DENSE], **{setting: 0}))
