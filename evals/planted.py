"""Suites that hide needles in running text: how their samples are made, whatever they ask."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, ClassVar, NamedTuple

from evals.fitted import fitted
from evals.ruler.essay import essay_of
from evals.ruler.templates import Template
from evals.stretch import LEAST, Needle, placed, stretch
from evals.task import Sample, Turn
from evals.wording import Wording, parted, share_found, worded


class Planted(NamedTuple):
    """What hides in a text, and what is asked about it; `template` puts the text in its place."""

    needles: Sequence[Needle]
    template: Template
    turns: tuple[Turn, ...]
    family: str
    extra: dict[str, Any]


class PlantedSuite(ABC):
    """Tasks in each wording; a subclass says what is planted, and where it should be.

    `extra["placed"]` says where it is: the shares of the text before each needle, 0..1.

    Args:
        haystack: the text; by default the reference pages of the Python language.
    """

    name: ClassVar[str]
    kinds: ClassVar[Sequence[str]]  # tasks, in any wording

    def __init__(self, seed: int = 42, haystack: str | None = None) -> None:
        self.seed = seed
        self._essay = essay_of(haystack)

    @property
    def tasks(self) -> Sequence[str]:
        return worded(self.kinds)

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """As `evals.task.Suite` has it. ConfigError: no such task, or too short a length."""
        kind, wording = parted(self.name, self.kinds, task)
        words = None
        for index in range(count):
            rng = Random(f"{self.seed} {self.drawn_by(task)} {index}")
            planted = self.plant(tokenizer, rng, kind, wording, index)
            make = self._maker(planted, rng, task, wording, length, index)
            sample, words = fitted(tokenizer, make, LEAST * len(planted.needles), guess=words)
            yield sample

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """0..100: the share of the turn's values that are among the numbers of the prediction."""
        return share_found(prediction, sample.turns[turn].outputs)

    @abstractmethod
    def plant(
        self, tokenizer: Any, rng: Random, kind: str, wording: Wording, index: int
    ) -> Planted:
        """Needles and questions of sample `index`."""

    def drawn_by(self, task: str) -> str:
        """What is drawn depends on this, the seed and the number alone."""
        return task

    def _maker(
        self, planted: Planted, rng: Random, task: str, wording: Wording, length: int, index: int
    ) -> Callable[[int], Sample]:
        """The sample with any number of words."""
        stretched = stretch(self._essay, rng, planted.needles)
        sample = partial(
            Sample,
            id=f"{self.name}/{task}/{length}/{index}",
            suite=self.name,
            task=task,
            family=planted.family,
            length=length,
            turns=planted.turns,
            chat=wording.chat,
        )

        def make(words: int) -> Sample:
            text = stretched(words)
            extra = planted.extra | {"placed": placed(text, planted.needles)}
            return sample(context=planted.template.context.format(context=text), extra=extra)

        return make
