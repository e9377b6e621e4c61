"""Samples as large as the length that was asked for allows."""

from collections.abc import Callable
from typing import Any

from engine.errors import ConfigError
from evals.fit import DoesNotFit, fit
from evals.prompt import prompt_tokens
from evals.task import Sample


class Unfit(ConfigError):
    """What a sample is made of is too much or too little for its length."""


def fitted(
    tokenizer: Any,
    make: Callable[[int], Sample],
    least: int,
    most: int | None = None,
    guess: int | None = None,
    filled: float = 0.0,
) -> tuple[Sample, int]:
    """The sample of the largest size that its length has room for, and that size.

    Args:
        make: the sample at a size from `least` up to `most`, in words, lines, or documents.
        guess: a size that fits a sample of the same task.
        filled: share of the length that it takes at the least, 0..1.
    Raises:
        Unfit: the least size takes more than the length, or the most less than `filled` of it.
    """
    smallest = make(least)

    def cost(size: int) -> int:
        return longest(tokenizer, make(size))

    try:
        size = fit(cost, smallest.length, least, most, guess)
    except DoesNotFit as error:
        raise Unfit(
            f"{smallest.id} needs {error.tokens:,} tokens at the least by this tokenizer: "
            "raise the length"
        ) from error
    if size == most and (tokens := cost(size)) < filled * smallest.length:
        raise Unfit(
            f"{smallest.id} has material for {tokens:,} tokens only: "
            "lower the length, or name a longer haystack or a larger file"
        )
    return make(size), size


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
