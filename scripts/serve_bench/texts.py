"""Prompts of a wanted length, of English that every machine has."""

from pydoc_data.topics import topics
from typing import Any


class Texts:
    """The pages of Python's reference, one after the other, again and again.

    Args:
        tokenizer: of `transformers`; lengths are by it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        whole = "\n".join(topics[name] for name in sorted(topics))
        self._ids: list[int] = tokenizer.encode(whole, add_special_tokens=False)

    def ids(self, start: int, tokens: int) -> list[int]:
        """So many tokens from some place on; any number is one."""
        size = len(self._ids)
        start %= size
        copies = (start + tokens) // size + 1
        return (self._ids * copies)[start : start + tokens]

    def text(self, start: int, tokens: int) -> str:
        """The same as text. Read again it may be a few tokens more or less."""
        return self._tokenizer.decode(self.ids(start, tokens))
