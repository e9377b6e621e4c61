"""Several questions about one text that is read once: the two modes of SCBench (2024)."""

from collections.abc import Sequence
from random import Random
from typing import Any

from evals.planted import Planted, PlantedSuite
from evals.stretch import Needle
from evals.task import Turn
from evals.wording import Fact, Wording

QUESTIONS = 8
EARLY = 0.05  # of the text, in which the needle of the last question stands


class MultiTurnSuite(PlantedSuite):
    """Needles with different keys, and a question about each, in each wording.

    `multi-request`: each question stands alone behind the text. `multi-turn`: behind the earlier
    questions and their references as answers, as in a conversation that went well so far.
    The last question is about the first needle: a method that keeps what the first questions
    needed has lost it by then. `extra` has the depths of the needles, 0..1, by turn.
    """

    name = "multiturn"
    kinds = ("multi-request", "multi-turn")

    def drawn_by(self, task: str) -> str:
        """The wording: both modes ask the same."""
        return task.rpartition("-")[2]

    def plant(
        self, tokenizer: Any, rng: Random, kind: str, wording: Wording, index: int
    ) -> Planted:
        """As many facts as there are questions."""
        facts, depths = wording.facts(rng, QUESTIONS), _depths(rng)
        return Planted(
            needles=[Needle(at, wording.state(x)) for at, x in zip(depths, facts, strict=True)],
            template=wording.one,
            turns=_turns(tokenizer, wording, facts, conversation=kind == "multi-turn"),
            family=kind,
            extra={"depths": depths},
        )


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
