"""Frequent words extraction: the top of a Zipf distribution (RULER, Hsieh et al. 2024)."""

import math
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from evals.ruler.draft import Draft
from evals.ruler.templates import FREQUENT_WORDS

LETTERS = 6
NOISE = "..."  # the most frequent word, which is not asked for
ASKED = slice(1, 4)
ZETA = math.pi**2 / 6  # zeta(2): frequencies fall with the square of the rank
LEAST = 73  # words at which rank 4 is more frequent than rank 5, as from there on always
TOKENS_PER_WORD = 50  # of the length, for each different word


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """A coded text. Sizes: words of it, about.

    Args:
        different: words in the vocabulary.
    """

    different: int

    @classmethod
    def make(cls, length: int, new_tokens: int) -> "FrequentWords":
        """With the vocabulary of a length in tokens; of 5 words at the least, to tell 4 of them."""
        return cls(max(5, (length - new_tokens) // TOKENS_PER_WORD))

    @property
    def least(self) -> int:
        return LEAST

    @property
    def most(self) -> None:
        return None

    def draft(self, rng: Random, index: int, size: int) -> Draft:
        ranked = [NOISE, *self._coded(rng)]
        counts = [int(size / rank**2 / ZETA) for rank in range(1, len(ranked) + 1)]
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        return Draft.of(FREQUENT_WORDS, ranked[ASKED], context=" ".join(text))

    def _coded(self, rng: Random) -> list[str]:
        coded: dict[str, None] = {}
        while len(coded) < self.different - 1:
            coded["".join(rng.choices(ascii_lowercase, k=LETTERS))] = None
        return list(coded)
