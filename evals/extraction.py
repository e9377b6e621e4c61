"""Extraction: one question whose answer lies scattered over the whole text, a number at a time.

What a method keeps as a few stretches of the text, or knows by the mean of a chunk, loses some.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from evals.stretch import Needle, essay_of, fitted, stretch
from evals.task import Sample
from evals.wording import Wording, parted, share_found, worded

TASKS = {"extract-8": 8, "extract-16": 16}  # values of the key


class ExtractionSuite:
    """All values of a key, one in each equal part of running text, in each wording.

    `extra` has their depths, 0..1, in the order of the outputs.

    Args:
        haystack: the text; by default the reference pages of the Python language.
    """

    def __init__(self, seed: int = 42, haystack: str | None = None) -> None:
        self.seed = seed
        self._essay = essay_of(haystack)

    @property
    def tasks(self) -> Sequence[str]:
        return worded(tuple(TASKS))

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """As `evals.task.Suite` has it. ConfigError: no such task, or too short a length."""
        name, wording = parted("extraction", tuple(TASKS), task)
        words = None
        for index in range(count):
            make = self._sample(tokenizer, task, wording, length, index, TASKS[name])
            sample, words = fitted(tokenizer, make, TASKS[name], words)
            yield sample

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """0..100: the share of the values that are among the numbers of the prediction."""
        return share_found(prediction, sample.turns[turn].outputs)

    def _sample(
        self, tokenizer: Any, task: str, wording: Wording, length: int, index: int, values: int
    ) -> Callable[[int], Sample]:
        rng = Random(f"{self.seed} {task} {index}")
        facts = wording.facts(rng, 1, values)
        depths = [(part + rng.random()) / values for part in range(values)]
        needles = [Needle(at, wording.state(x)) for at, x in zip(depths, facts, strict=True)]
        text = stretch(self._essay, rng, needles)
        sample = partial(
            Sample,
            id=f"extraction/{task}/{length}/{index}",
            suite="extraction",
            task=task,
            family="extraction",
            length=length,
            turns=(wording.ask(tokenizer, facts),),
            chat=wording.chat,
            extra={"depths": depths},
        )
        return lambda words: sample(context=wording.many.context.format(context=text(words)))
