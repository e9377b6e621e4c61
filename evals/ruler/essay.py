"""Running text to hide needles in: a text of the user's, or one that comes with Python."""

import re
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

from engine.errors import ConfigError

# RULER cuts with nltk's trained model; here a needle stands wherever a sentence may have ended
ENDS, CLOSERS = ".!?。！？", "\"')]」』"
SENTENCE_END = re.compile(rf"(?<=[{ENDS}]) |(?<=[{ENDS}][{re.escape(CLOSERS)}]) ")
WORD = re.compile(r"[a-z]{3,}")


@dataclass(frozen=True, slots=True)
class Essay:
    """A text as a run of words, which begins again where it ends.

    Args:
        text: with single blanks between its words.
        words: all of them, in order.
    """

    text: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Essay":
        """Raises ConfigError where the text has no words."""
        words = tuple(text.split())
        if not words:
            raise ConfigError("the haystack is empty: name a file with text in it")
        return cls(" ".join(words), words)

    def sentences(self, count: int) -> list[str]:
        """The first `count` words, cut into sentences."""
        repeats = -(-count // len(self.words))
        return SENTENCE_END.split(" ".join((self.words * repeats)[:count]))

    def vocabulary(self) -> list[str]:
        """Its different lower-case words, sorted."""
        return sorted(set(WORD.findall(self.text)))


def essay_of(haystack: str | None) -> Essay:
    """The text of a user, or the one that comes with Python."""
    return default_essay() if haystack is None else Essay.of(haystack)


@cache
def default_essay() -> Essay:
    """`default_text` as an essay."""
    return Essay.of(default_text())


def default_text() -> str:
    """Reference pages of the Python language: text of Python's library, as its release has it.

    Another release, be it a patch of the same version, may have another text.
    """
    return " ".join(topics[name] for name in sorted(topics))
