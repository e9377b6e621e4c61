"""English words, from the lists of the wonderwords package, as RULER takes them."""

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from random import Random

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Words:
    """Word lists, sorted.

    Args:
        origin: package and version: other versions have other lists, and give other samples.
    """

    origin: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    every: tuple[str, ...]

    def pair(self, rng: Random) -> str:
        """`adjective-noun`, of all pairs there are."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"


@cache
def load_words() -> Words:
    """Adjectives, nouns, and both with the verbs.

    Raises:
        ConfigError: the package is missing.
    """
    try:
        package = importlib.import_module("wonderwords")
    except ImportError:
        raise ConfigError(
            "this task takes its words from wonderwords, which is missing: "
            "pip install 'headrace[evals]'"
        ) from None
    lists = package.RandomWord(enhanced_prefixes=False)
    adjectives, nouns, verbs = (
        tuple(lists.filter(include_categories=[kind])) for kind in ("adjective", "noun", "verb")
    )
    every = tuple(sorted({*adjectives, *nouns, *verbs}))
    return Words(f"wonderwords {version('wonderwords')}", adjectives, nouns, every)
