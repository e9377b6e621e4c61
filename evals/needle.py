"""A needle in a haystack: one fact at a depth of a text of a length (gkamradt, 2023)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from evals.stretch import Needle, essay_of, fitted, stretch
from evals.task import Sample
from evals.wording import Wording, parted, share_found, worded

TASKS = ("needle",)
# so that the first 2, 3, 5, 9 and 17 are even grids
DEPTHS = (0.0, 1.0, *(part / size for size in (2, 4, 8, 16) for part in range(1, size, 2)))


class NeedleSuite:
    """One needle in running text, in each wording; `extra` has its depth, 0 (first) to 1 (last).

    Sample `index` stands at `DEPTHS[index]`, from the start again after the last of them, each
    in a text of its own. Where it falls into a sentence, it moves back to that one's beginning.

    Args:
        haystack: the text; by default the reference pages of the Python language.
    """

    def __init__(self, seed: int = 42, haystack: str | None = None) -> None:
        self.seed = seed
        self._essay = essay_of(haystack)

    @property
    def tasks(self) -> Sequence[str]:
        return worded(TASKS)

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """As `evals.task.Suite` has it. ConfigError: no such task, or too short a length."""
        _, wording = parted("needle", TASKS, task)
        words = None
        for index in range(count):
            make = self._sample(tokenizer, task, wording, length, index)
            sample, words = fitted(tokenizer, make, 1, words)
            yield sample

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """100 where the value is among the numbers of the prediction, else 0."""
        return share_found(prediction, sample.turns[turn].outputs)

    def _sample(
        self, tokenizer: Any, task: str, wording: Wording, length: int, index: int
    ) -> Callable[[int], Sample]:
        rng = Random(f"{self.seed} {task} {index}")
        facts = wording.facts(rng, 1)
        depth = DEPTHS[index % len(DEPTHS)]
        text = stretch(self._essay, rng, [Needle(depth, wording.state(facts[0]))])
        turn = wording.ask(tokenizer, facts)
        sample = partial(
            Sample,
            id=f"needle/{task}/{length}/{index}",
            suite="needle",
            task=task,
            family="single needle",
            length=length,
            turns=(turn,),
            chat=wording.chat,
            extra={"depth": depth},
        )
        return lambda words: sample(context=wording.one.context.format(context=text(words)))
