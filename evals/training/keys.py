"""Keys and values of the facts: random, so that only looking them up helps."""

import uuid
from collections.abc import Callable
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from engine.demo.haystack import KEYS

HAYSTACK_KEYS = tuple(KEYS.split())


class Names:
    """Draws keys and values; never the same key twice.

    Args:
        words: what word keys are made of.
        short: those of one token, for keys of one word.
    """

    def __init__(self, words: tuple[str, ...], short: tuple[str, ...], rng: np.random.Generator):
        self._words, self._short, self._rng, self._used = words, short, rng, set[str]()

    def pair(self) -> str:
        """Two words and a hyphen, as RULER's adjective-noun keys; one in ten of random letters."""
        return self._new(lambda: f"{self._word()}-{self._word()}")

    def single(self) -> str:
        """One word: mostly of one token, `engine.demo.haystack`'s keys among them."""
        return self._new(self._one)

    def uuid(self) -> str:
        """A uuid4."""
        return self._new(lambda: str(uuid.UUID(bytes=self._rng.bytes(16), version=4)))

    def number(self, digits: int) -> str:
        """A number of `digits` digits that does not begin with 0."""
        low = 10 ** (digits - 1)
        return self._new(lambda: str(self._rng.integers(low, 10 * low)))

    def variable(self, letters: int) -> str:
        """Capitals."""
        return self._new(lambda: self._letters(ascii_uppercase, letters))

    def _one(self) -> str:
        return self._of(self._short) if self._rng.random() < 0.8 else self._word()

    def _word(self) -> str:
        if self._rng.random() < 0.1:
            return self._letters(ascii_lowercase, int(self._rng.integers(3, 8)))
        return self._of(self._words)

    def _of(self, words: tuple[str, ...]) -> str:
        return words[self._rng.integers(len(words))]

    def _letters(self, alphabet: str, number: int) -> str:
        return "".join(alphabet[i] for i in self._rng.integers(len(alphabet), size=number))

    def _new(self, draw: Callable[[], str]) -> str:
        while (name := draw()) in self._used:
            pass
        self._used.add(name)
        return name
