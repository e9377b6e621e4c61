"""Several questions about one text that is read once: the two modes of SCBench (2024)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from evals.stretch import Needle, essay_of, fitted, stretch
from evals.task import Sample, Turn
from evals.wording import Fact, Wording, parted, share_found, worded

TASKS = ("multi-request", "multi-turn")
QUESTIONS = 8
EARLY = 0.05  # of the text, in which the needle of the last question stands


class MultiTurnSuite:
    """Needles with different keys, and a question about each, in each wording.

    `multi-request`: each question stands alone behind the text. `multi-turn`: behind the earlier
    questions and their references as answers, as in a conversation that went well so far.
    The last question is about the first needle: a method that keeps what the first questions
    needed has lost it by then. `extra` has the depths of the needles, 0..1, by turn.

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
        mode, wording = parted("multiturn", TASKS, task)
        words = None
        for index in range(count):
            make = self._sample(tokenizer, task, mode, wording, length, index)
            sample, words = fitted(tokenizer, make, QUESTIONS, words)
            yield sample

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """100 where the turn's value is among the numbers of the prediction, else 0."""
        return share_found(prediction, sample.turns[turn].outputs)

    def _sample(
        self, tokenizer: Any, task: str, mode: str, wording: Wording, length: int, index: int
    ) -> Callable[[int], Sample]:
        rng = Random(f"{self.seed} {task.rpartition('-')[2]} {index}")  # both modes ask the same
        facts, depths = wording.facts(rng, QUESTIONS), _depths(rng)
        needles = [Needle(at, wording.state(x)) for at, x in zip(depths, facts, strict=True)]
        text = stretch(self._essay, rng, needles)
        turns = _turns(tokenizer, wording, facts, conversation=mode == "multi-turn")
        sample = partial(
            Sample,
            id=f"multiturn/{task}/{length}/{index}",
            suite="multiturn",
            task=task,
            family=mode,
            length=length,
            turns=turns,
            chat=wording.chat,
            extra={"depths": depths},
        )
        return lambda words: sample(context=wording.one.context.format(context=text(words)))


def _depths(rng: Random) -> list[float]:
    """One in each equal part of the text, in any order, but the first part's last, and early."""
    later = [(part + rng.random()) / QUESTIONS for part in range(1, QUESTIONS)]
    rng.shuffle(later)
    return [*later, EARLY * rng.random()]


def _turns(
    tokenizer: Any, wording: Wording, facts: Sequence[Fact], *, conversation: bool
) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    before = ""
    for fact in facts:
        turns.append(wording.ask(tokenizer, [fact], before))
        if conversation:
            before = wording.answered(turns[-1])
    return tuple(turns)
