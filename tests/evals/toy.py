"""A suite of short needles that the smallest model answers, and `headrace-eval` with it."""

import sys
from collections.abc import Iterator
from typing import Any

from engine.demo.haystack import Haystack
from engine.errors import ConfigError
from evals import registry
from evals.settings import RunSettings
from evals.task import Sample, Turn

TASKS = ("pairs", "single")
KIND = registry.Kind("tests.evals.toy", "ToySuite", ("seed",))


class ToySuite:
    """Needles in a few sentences, two questions about each of the pairs."""

    def __init__(self, seed: int = 42) -> None:
        self.seed = seed
        self.tasks = TASKS

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        if length < 150:
            raise ConfigError(f"toy needs 150 tokens, got {length}")
        for i in range(count):
            yield make_sample(tokenizer, task, length, seed=100 * self.seed + i, number=i)

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        return 100.0 * (sample.turns[turn].outputs[0] in prediction)


def make_sample(tokenizer: Any, task: str, length: int, *, seed: int, number: int) -> Sample:
    hay = Haystack.build(tokenizer, tokens=length - 50, facts=2, seed=seed)
    asked = hay.facts if task == "pairs" else hay.facts[:1]
    return Sample(
        id=f"toy/{task}/{length}/{number}",
        suite="toy",
        task=task,
        family=task,
        length=length,
        context=hay.text,
        turns=tuple(Turn(f"\n\n{fact.question}", "", (fact.value,), 4) for fact in asked),
        extra={"depth": 0.5},
    )


def settings(**changes: Any) -> RunSettings:
    """A small run."""
    usual = dict(suite=("toy",), method=("headrace",), budget=(0.2,), lengths=(200,), limit=2)
    return RunSettings(**usual | changes)


if __name__ == "__main__":
    from evals.cli import main

    registry.SUITES["toy"] = KIND
    sys.exit(main(sys.argv[1:]))
