"""A stretch of running text with needles in it, as long as a prompt may be."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from engine.errors import ConfigError
from evals.prompt import prompt_tokens
from evals.ruler.draft import insert
from evals.ruler.essay import CLOSERS, ENDS, Essay
from evals.ruler.fit import DoesNotFit, fit
from evals.task import Sample

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


def fitted(
    tokenizer: Any, make: Callable[[int], Sample], needles: int, guess: int | None
) -> tuple[Sample, int]:
    """The sample with as many words as its length has room for, and that number.

    Args:
        make: a sample with so many words around its needles.
        guess: words that fit a sample of the same task.
    Raises:
        ConfigError: there is no room for `LEAST` words a needle.
    """
    smallest = make(LEAST * needles)

    def cost(words: int) -> int:
        return longest(tokenizer, make(words))

    try:
        words = fit(cost, smallest.length, LEAST * needles, None, guess)
    except DoesNotFit as error:
        raise ConfigError(
            f"{smallest.id} needs {error.tokens:,} tokens at the least by this tokenizer: "
            "raise the length"
        ) from error
    return make(words), words


def longest(tokenizer: Any, sample: Sample) -> int:
    """Tokens of the longest prompt of a sample and of its answer.

    Its turns are compared by their own tokens: all of them follow the same text.
    """

    def own(number: int) -> int:
        turn = sample.turns[number]
        text = turn.question + turn.prefix
        return len(tokenizer(text, verbose=False)["input_ids"]) + turn.max_new_tokens

    turn = max(range(len(sample.turns)), key=own)
    return prompt_tokens(tokenizer, sample, turn) + sample.turns[turn].max_new_tokens
