"""Engines and samples of small random models, whose texts are token ids with spaces between."""

from engine.engine import Engine
from engine.method import preset
from evals.task import Sample, Turn
from evals.trial import prompts, trials
from evals.ways import Way
from tests.engine.families import build, prompt


class Numbers:
    """A tokenizer whose words are token ids."""

    chat_template = None
    all_special_ids = ()

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens, **_):
        return text(tokens)


def make_engine(family="llama", config=None, **changes):
    return Engine(build(family, **changes), Numbers(), config)


def text(tokens):
    return " ".join(map(str, tokens)) + " "


def make_sample(context=200, questions=((5, 6, 7),), seed=0, name="sample"):
    turns = tuple(Turn(text(question), "", (), 1) for question in questions)
    words = text(prompt(context, seed=seed).tolist())
    return Sample(name, "random", "random", "noise", context, words, turns)


def way(name, budget=100_000, **changes):
    return Way(name, float(budget), preset(name, budget=budget, **changes))


def make_trial(engine, sample=None, room=40):
    """The first turn of a sample."""
    sample = sample or make_sample()
    return next(trials(engine, sample, prompts(engine, sample, room), room, 64))
