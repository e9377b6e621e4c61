"""Training: the same data in the same order, whether it was interrupted or not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from evals.training.batches import collate, draw_batch
from evals.training.exam import Exam
from evals.training.recipe import REFERENCE, REFINED, TINY
from evals.training.run import Training, train
from evals.training.tasks import TASKS
from evals.training.windows import ANSWER, LANGUAGE


def make(windows, seed=0):
    return Training(TINY, windows, seed=seed)


def steps(training, number):
    for _ in range(number):
        training.train_step(training.step / 10)


def test_going_on_from_a_checkpoint_gives_the_same_weights(windows, tmp_path):
    whole = make(windows)
    steps(whole, 4)
    first = make(windows)
    steps(first, 2)
    first.save(tmp_path / "checkpoint.pt")
    second = make(windows)
    second.load(tmp_path / "checkpoint.pt")
    steps(second, 2)
    assert (second.step, second.tokens) == (whole.step, whole.tokens)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, second.network.state_dict()[name]), name


def test_a_seed_gives_its_own_data(windows):
    one, same, other = (
        draw_batch(TINY, windows, 0.0, np.random.default_rng([seed, 3])).ids for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_a_checkpoint_of_another_seed_is_refused(windows, tmp_path):
    make(windows).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="has seed 0, not 1: set --seed"):
        make(windows, seed=1).load(tmp_path / "checkpoint.pt")


def test_no_checkpoint_is_a_clear_error(windows, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint at .*: train without --resume first"):
        make(windows).load(tmp_path / "checkpoint.pt")


def test_a_few_steps_lower_the_loss(windows):
    training = make(windows)
    losses = [training.train_step(0.0).total.item() for _ in range(12)]
    assert losses[-1] < losses[0]


def test_training_reports_and_keeps_at_its_end(windows):
    lines, kept = [], []
    train(
        make(windows),
        3,
        every_s=math.inf,
        report=lines.append,
        keep=lambda: kept.append(True),
    )
    assert [line["step"] for line in lines] == [3]
    assert lines[0]["tokens"] > 0
    assert kept == [True]


def test_rates_rise_stay_and_fall():
    rates = [REFERENCE.rate(progress, 10**6) for progress in (0.0, REFERENCE.steady, 0.9, 1.0)]
    assert rates[0] == rates[1] == 1.0
    assert 1.0 > rates[2] > rates[3] == pytest.approx(0.03)
    assert REFERENCE.rate(0.0, 0) == pytest.approx(1 / REFERENCE.warm_up)


def test_every_phase_has_windows_and_every_task_a_weight():
    phases = [*REFERENCE.phases, *REFINED.phases]
    assert {task for phase in phases for task in phase.mix.tasks} == set(TASKS)
    assert [REFERENCE.phase(at).until for at in (0.0, 0.999, 1.0)][1:] == [1.0, 1.0]
    assert max(max(phase.lengths) for phase in REFERENCE.phases) == 4096


def test_a_place_is_learned_at_the_token_before_it(windows):
    window = windows.draw(TINY.phases[0].mix, 128, np.random.default_rng(0))
    batch = collate([window], 1.0, np.random.default_rng(0))
    assert (window.kinds[batch.answers.numpy() + 1] == ANSWER).all()
    assert len(batch.answers) == (window.kinds[1:] == ANSWER).sum()
    assert (window.kinds[batch.language.numpy() + 1] == LANGUAGE).all()


def test_an_untrained_network_fails_the_exam_on_two_hops(windows, corpus, tokenizer):
    marks = Exam(corpus, tokenizer, ("two_hops", "plain")).mark(make(windows).network, 256, 2)
    assert set(marks) == {"two_hops", "plain"}
    assert marks["two_hops"] < 0.5


def test_a_window_too_short_for_an_answer_is_not_one_that_is_right(windows, corpus, tokenizer):
    exam = Exam(corpus, tokenizer, ("two_hops", "plain"))
    assert exam.mark(make(windows).network, 8, 2) == {}


def test_the_exam_is_in_text_that_was_held_out(windows, corpus, tokenizer):
    network, seen = make(windows).network, []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    texts = len(corpus.trained)
    marked = replace(
        corpus, trained=(("Trained. ",) * 9,) * texts, held_out=(("Kept. ",) * 9,) * texts
    )
    Exam(marked, tokenizer, ("plain",)).mark(network, 256, 2)
    shown = " ".join(tokenizer.decode(ids[0]) for ids in seen)
    assert "Kept." in shown
    assert "Trained." not in shown
