"""A stretch of running text with needles in it, as long as a prompt may be."""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from evals.ruler.draft import insert
from evals.ruler.essay import CLOSERS, ENDS, Essay

LEAST = 16  # words around each needle
NEAR = 1 / 50  # of a text, that a needle may move back to where a sentence begins
SENTENCE = 24  # words that it may in any case


class Needle(NamedTuple):
    """A sentence to be hidden.

    Args:
        depth: share of the text before it, 0..1.
    """

    depth: float
    text: str


def stretch(essay: Essay, rng: Random, needles: Sequence[Needle]) -> Callable[[int], str]:
    """Text of any number of words with the needles in it; from a random place on."""
    start = _sentence(essay.words, rng.randrange(len(essay.words)))
    words = essay.words[start:] + essay.words[:start]

    def text(count: int) -> str:
        return hide((words * -(-count // len(words)))[:count], needles)

    return text


def hide(words: Sequence[str], needles: Sequence[Needle]) -> str:
    """Words with needles at their depths, each moved back to the beginning of its sentence.

    Where that is far, as in a text without sentences, it stands right at its depth. One at depth 1
    stands at the very end, wherever the text breaks off (gkamradt's needle in a haystack, 2023).
    """
    ordered = sorted(needles, key=lambda needle: needle.depth)
    places = [_place(words, needle.depth) for needle in ordered]
    return " ".join(insert(words, [needle.text for needle in ordered], places))


def _place(words: Sequence[str], depth: float) -> int:
    return len(words) if depth == 1 else _sentence(words, int(depth * len(words)))


def _sentence(words: Sequence[str], place: int) -> int:
    """The last beginning of a sentence up to `place`; `place` itself where that is not near."""
    first = max(0, place - max(SENTENCE, int(NEAR * len(words))))
    near = range(place, first - 1, -1)
    begins = (i for i in near if i == 0 or words[i - 1].rstrip(CLOSERS).endswith(tuple(ENDS)))
    return next(begins, place)


def placed(text: str, needles: Sequence[Needle]) -> list[float]:
    """The shares of a text before each of the needles in it, as they came out."""
    return [
        round(text.index(needle.text) / max(1, len(text) - len(needle.text)), 4)
        for needle in needles
    ]
