"""Extraction: one question whose answer lies scattered over the whole text, a number at a time.

What a method keeps as a few stretches of the text, or knows by the mean of a chunk, loses some.
"""

from random import Random
from typing import Any

from evals.planted import Planted, PlantedSuite
from evals.stretch import Needle
from evals.wording import Wording

TASKS = {"extract-8": 8, "extract-16": 16}  # values of the key


class ExtractionSuite(PlantedSuite):
    """All values of a key, one in each equal part of running text, in each wording.

    `extra` has their depths, 0..1, in the order of the outputs.
    """

    name = "extraction"
    kinds = tuple(TASKS)

    def plant(
        self, tokenizer: Any, rng: Random, kind: str, wording: Wording, index: int
    ) -> Planted:
        """One key, and as many values as the task has."""
        values = TASKS[kind]
        facts = wording.facts(rng, 1, values)
        depths = [(part + rng.random()) / values for part in range(values)]
        return Planted(
            needles=[Needle(at, wording.state(x)) for at, x in zip(depths, facts, strict=True)],
            template=wording.many,
            turns=(wording.ask(tokenizer, facts),),
            family="extraction",
            extra={"depths": depths},
        )
