"""Prompts that are too long lose their middle: both ends instruct (LongBench, Bai et al. 2023)."""

from dataclasses import replace
from itertools import takewhile
from typing import Any

from engine.errors import ConfigError
from evals.prompt import prompt_tokens
from evals.task import Sample


def cut_to_length(tokenizer: Any, sample: Sample) -> Sample:
    """The sample, of one turn, with its first and last tokens only where it is longer than asked.

    As many of the first as of the last, each decoded on their own. The question's part is what is
    left of the question; where that is all of it, the context alone was cut.

    Raises:
        ConfigError: the length leaves no room for a prompt.
    """
    room = sample.length - sample.turns[0].max_new_tokens
    if prompt_tokens(tokenizer, sample) <= room:
        return sample
    ids = tokenizer(sample.context + sample.turns[0].question, verbose=False)["input_ids"]
    kept = room
    while kept >= 2:
        half = kept // 2
        ends = (_decode(tokenizer, part) for part in (ids[:half], ids[-half:]))
        cut = _divided(sample, "".join(ends))
        used = prompt_tokens(tokenizer, cut)
        if used <= room:
            return cut
        kept -= used - room  # for a chat template, and the parts of a character cut in two
    raise ConfigError(f"{sample.id} leaves no room for a prompt: raise the length")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _divided(sample: Sample, text: str) -> Sample:
    """The sample with another prompt: its question is what both end with."""
    turn = sample.turns[0]
    pairs = zip(reversed(text), reversed(turn.question), strict=False)
    at = len(text) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return replace(sample, context=text[:at], turns=(replace(turn, question=text[at:]),))
