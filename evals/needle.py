"""A needle in a haystack: one fact at a depth of a text of a length (gkamradt, 2023)."""

from random import Random
from typing import Any

from evals.planted import Planted, PlantedSuite
from evals.stretch import Needle
from evals.wording import Wording

# so that the first 2, 3, 5, 9 and 17 are even grids
DEPTHS = (0.0, 1.0, *(part / size for size in (2, 4, 8, 16) for part in range(1, size, 2)))


class NeedleSuite(PlantedSuite):
    """One needle in running text, in each wording; it should be at `extra["depth"]`, 0 to 1.

    Sample `index` stands at `DEPTHS[index]`, from the start again after the last of them, each
    in a text of its own. It moves back to the beginning of its sentence, where that is near.
    """

    name = "needle"
    kinds = ("needle",)

    def plant(
        self, tokenizer: Any, rng: Random, kind: str, wording: Wording, index: int
    ) -> Planted:
        """One fact."""
        facts, depth = wording.facts(rng, 1), DEPTHS[index % len(DEPTHS)]
        return Planted(
            needles=[Needle(depth, wording.state(facts[0]))],
            template=wording.one,
            turns=(wording.ask(tokenizer, facts),),
            family="single needle",
            extra={"depth": depth},
        )
