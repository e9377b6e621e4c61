"""A long text that every machine has, with facts hidden in it, and the questions about them."""

import random
import re
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from engine.errors import ConfigError

# one token each for the embedded models, which were trained to look such keys up
KEYS = """tiger ruby Paris violin hammer winter castle comet Monday omega zebra copper Tokyo
piano lantern April harbor nebula falcon amber Cairo guitar rocket summer bridge planet otter
silver Vienna trumpet mirror spring desert galaxy panda quartz Lisbon cello compass autumn"""
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to be found again."""

    key: str
    value: str

    @property
    def statement(self) -> str:
        return f" The special magic number for {self.key} is {self.value}."

    @property
    def question(self) -> str:
        return f"What is the special magic number for {self.key}?"

    def answered_by(self, text: str) -> bool:
        """Whether the first number in `text` is the value, digit for digit."""
        found = re.search(r"\d+", text)
        return found is not None and found.group() == self.value


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text and the facts in it, in the order in which they appear."""

    text: str
    facts: tuple[Fact, ...]

    @classmethod
    def build(cls, tokenizer: Any, *, tokens: int, facts: int, seed: int) -> "Haystack":
        """Reference pages of the Python language with facts spread over their whole length.

        Args:
            tokens: at most so many by `tokenizer`, the facts included.
            seed: where the pages start, and which facts are hidden at which sentence ends.
        Raises:
            ConfigError: more facts than there are keys, or too few tokens for them.
        """
        rng = random.Random(seed)
        chosen = _facts(rng, facts)
        room = tokens - sum(count_tokens(tokenizer, fact.statement) + 1 for fact in chosen)
        if room < 16 * facts:
            raise ConfigError(
                f"there is no room for {facts} facts in {tokens} tokens of text: raise the tokens"
            )
        return cls(_hide(rng, _pages(rng, tokenizer, room), chosen), chosen)


def _facts(rng: random.Random, number: int) -> tuple[Fact, ...]:
    keys = KEYS.split()
    if not 1 <= number <= len(keys):
        raise ConfigError(f"facts must be 1 to {len(keys)}, got {number}")
    return tuple(Fact(key, f"{rng.randrange(10**6):06}") for key in rng.sample(keys, number))


def _pages(rng: random.Random, tokenizer: Any, tokens: int) -> str:
    """`tokens` tokens of the pages, from a random sentence on, again from the start if needed."""
    pages = "".join(topics[name] for name in sorted(topics))
    start = rng.choice([end.start() for end in SENTENCE_END.finditer(pages)])
    text = (pages[start:] + pages[:start]).lstrip()
    while count_tokens(tokenizer, text[: tokens * 16]) < tokens and len(text) < tokens * 16:
        text += text
    encoded = tokenizer(
        text[: tokens * 16], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return text[: encoded["offset_mapping"][tokens - 1][1]]


def _hide(rng: random.Random, text: str, facts: tuple[Fact, ...]) -> str:
    """`text` with the facts at ends of sentences, one in every equal part of it."""
    ends = [end.start() for end in SENTENCE_END.finditer(text)] or [len(text)]
    pieces, last = [], 0
    for number, fact in enumerate(facts):
        wanted = (number + rng.random()) / len(facts) * len(text)
        place = max(last, min(ends, key=lambda end: abs(end - wanted)))
        pieces += [text[last:place], fact.statement]
        last = place
    return "".join([*pieces, text[last:]])


def count_tokens(tokenizer: Any, text: str) -> int:
    """Of a text alone, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
