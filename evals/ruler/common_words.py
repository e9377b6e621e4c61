"""Common words extraction: which words a list repeats most (RULER, Hsieh et al. 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from evals.ruler.draft import Draft
from evals.ruler.templates import COMMON_WORDS

COMMON = 10  # words that are asked for
SHORT = 4096  # tokens; below, words repeat less often


class Repeats(NamedTuple):
    """How often the words that are asked for stand in a list, and how often all others."""

    common: int
    rare: int


@dataclass(frozen=True, slots=True)
class CommonWords:
    """A solved example, then the problem. Sizes: different words of the problem's list.

    Args:
        length: tokens that are asked for.
        words: different ones.
        more: others, for lists that need more different words than there are.
    """

    length: int
    words: Sequence[str]
    more: Sequence[str] = ()

    @property
    def least(self) -> int:
        return COMMON + 1

    @property
    def most(self) -> int:
        return len(self.words) + len(self.more)

    def draft(self, rng: Random, index: int, size: int) -> Draft:
        short = self.length < SHORT
        example = self._problem(
            rng, 20 if short else 40, Repeats(3, 1) if short else Repeats(10, 3)
        )
        problem = self._problem(rng, size, Repeats(6, 1) if short else Repeats(30, 3))
        solved = f"{example.text}{_numbered(example.outputs)}\n"
        return Draft(solved + problem.context, problem.question, problem.prefix, problem.outputs)

    def _problem(self, rng: Random, different: int, repeats: Repeats) -> Draft:
        every = self.words if different <= len(self.words) else [*self.words, *self.more]
        drawn = rng.sample(every, different)
        common, rare = drawn[:COMMON], drawn[COMMON:]
        listed = common * repeats.common + rare * repeats.rare
        rng.shuffle(listed)
        return Draft.of(COMMON_WORDS, common, context=_numbered(listed))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
