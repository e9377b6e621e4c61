"""Needles in a haystack: the eight retrieval tasks of RULER (Hsieh et al. 2024)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeAlias
from uuid import UUID

from evals.ruler.draft import Draft, insert
from evals.ruler.essay import Essay
from evals.ruler.templates import NEEDLE, NIAH, NOISE, singular
from evals.ruler.words import Words

Kind: TypeAlias = Literal["numbers", "words", "uuids"]
Draw: TypeAlias = Callable[[Random], str]
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of an essay's sentences


@dataclass(frozen=True, slots=True)
class Needles:
    """Which needles, and what they are hidden in.

    Args:
        haystack: running text, one sentence of noise again and again, or more needles.
        keys, values: different keys, and values of each.
        queries: keys that are asked for.
    """

    haystack: Literal["essay", "noise", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True, slots=True)
class Niah:
    """The prompts of one needle task. Sizes: words of an essay, lines of the other haystacks.

    Args:
        words: needed where a key is made of words.
    """

    needles: Needles
    essay: Essay
    words: Words | None

    @property
    def least(self) -> int:
        lines = self.needles.haystack != "essay"
        return self.needles.keys * self.needles.values if lines else 1

    @property
    def most(self) -> None:
        return None

    def draft(self, rng: Random, index: int, size: int) -> Draft:
        kinds, seen = self.needles, set[str]()
        keys = self._draws(rng, kinds.key, kinds.keys, seen)
        values = {key: self._draws(rng, kinds.value, kinds.values, seen) for key in keys}
        asked = rng.sample(keys, kinds.queries)
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        outputs = [value for key in asked for value in values[key]]
        only = len(outputs) == 1
        context = self._hide(rng, needles, size, seen)
        return Draft.of(
            singular(NIAH) if only else NIAH,
            outputs,
            _depth(context, self._needle(asked[0], outputs[0])) if only else None,
            context=context,
            query=_listed(asked),
            type_needle_v=kinds.value.removesuffix("s") if only else kinds.value,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.needles.value, key=key, value=value)

    def _hide(self, rng: Random, needles: list[str], size: int, seen: set[str]) -> str:
        if self.needles.haystack == "essay":
            sentences = self.essay.sentences(size)
            depths = sorted(rng.sample(DEPTHS, len(needles)))
            return " ".join(insert(sentences, needles, [len(sentences) * x // 100 for x in depths]))
        places = sorted(rng.sample(range(size), len(needles)))
        if self.needles.haystack == "noise":
            return "\n".join(insert([NOISE] * size, needles, places))
        keys = self._draws(rng, self.needles.key, size, seen)
        values = self._draws(rng, self.needles.value, size, seen)
        lines = [self._needle(*pair) for pair in zip(keys, values, strict=True)]
        return "\n".join(insert(lines, needles, places))

    def _draws(self, rng: Random, kind: Kind, count: int, seen: set[str]) -> list[str]:
        """Different ones that no needle has yet, which `seen` then knows, and no essay."""
        text = self.essay.text if self.needles.haystack == "essay" else ""
        return [_another(rng, self._draw(kind), seen, text) for _ in range(count)]

    def _draw(self, kind: Kind) -> Draw:
        if kind == "words":
            assert self.words is not None, "keys of words come with words"
            return self.words.pair
        return _number if kind == "numbers" else _uuid


def _another(rng: Random, draw: Draw, seen: set[str], text: Collection[str]) -> str:
    while (drawn := draw(rng)) in seen or drawn in text:
        pass
    seen.add(drawn)
    return drawn


def _number(rng: Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]


def _depth(context: str, needle: str) -> float:
    """How much of the haystack comes before the needle: 0 none, 1 all."""
    return context.index(needle) / max(1, len(context) - len(needle))
