"""Documents cut into chunks: at paragraphs if possible, and never longer than asked."""

import re
import threading
from bisect import bisect_right
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import PromptError
from engine.unicode import check_unicode

LITERALLY = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
BREAK = "\n\n"  # between a title and its text, and between chunks
CUTS = tuple(
    re.compile(pattern)
    for pattern in (r"\n\s*\n", r"\n", r"[.!?]['\")\]]*\s|[。！？]['\"」』）]*", r"\s")
)  # from the best place for a cut to the worst


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, and the tokens that stand for it and its title."""

    text: str
    tokens: tuple[int, ...]


class Splitter:
    """Cuts texts with a tokenizer of its own. Thread-safe.

    What looks like a special token is text like any other. `transformers` keeps that choice in the
    tokenizer itself, where it would reach whoever else encodes at that moment: hence the copy,
    which is made when it is needed first.

    Args:
        tokenizer: whose tokens these are; it stays as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._given = tokenizer
        self._lock = threading.Lock()  # while the copy is made
        self._copy: Any = None

    def split(self, text: str, *, limit: int, title: str = "") -> list[Piece]:
        """The text in pieces of at most `limit` tokens, title included; none of an empty text.

        A piece ends at the last paragraph that fits, else at a line, a sentence, a word or a token,
        but is at least half as long as it may be.

        Raises:
            PromptError: a title that takes half of a chunk, no room for a single character, text
                that is not Unicode, or a tokenizer that does not say where its tokens stand.
        """
        check_unicode(title, "the title")
        head = f"{title.strip()}{BREAK}" if title.strip() else ""
        room = limit - len(self.encode(head))
        if 2 * room < limit:
            raise PromptError(
                f"chunks of {limit} tokens have {max(room, 0)} left beside the title {title!r}: "
                "raise chunk_tokens or shorten the title"
            )
        cutter = _Cutter(self._tokenizer, text, head, limit, *_places(self._tokenizer, text))
        pieces, at = [], _next(text, 0)
        while at < len(text) and cutter.ends:
            piece, stop = cutter.cut(at, room)
            pieces.append(piece)
            at = _next(text, stop)
        return pieces

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without special tokens, also where it spells one."""
        return _encode(self._tokenizer, text)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its bytes by these.

        But for white space at its ends, and for tokenizers that have one token for all they do
        not know.
        """
        return max((len(str(token).encode()) for token in self._tokenizer.get_vocab()), default=1)

    @property
    def _tokenizer(self) -> Any:
        with self._lock:
            if self._copy is None:
                made = deepcopy(self._given)
                _encode(made, "")  # it is set now, and never again
                self._copy = made
            return self._copy


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, **LITERALLY)["input_ids"])


@dataclass(frozen=True, slots=True)
class _Cutter:
    tokenizer: Any
    text: str
    head: str  # of every piece
    limit: int
    starts: list[int]  # of the text's tokens, in characters
    ends: list[int]

    def cut(self, start: int, room: int) -> tuple[Piece, int]:
        """The longest good piece from `start` on, and where it ends.

        Tokens of a piece alone may be a few more than of the same text in its document.
        """
        first = bisect_right(self.ends, start)  # the token that `start` is in
        while room > 0:
            last = min(first + room, len(self.ends)) - 1
            half = max(start, self.starts[(first + last + 1) // 2])
            stop = self._boundary(half, self.ends[last])
            piece = self.text[start:stop].strip()
            tokens = _encode(self.tokenizer, self.head + piece)
            if len(tokens) <= self.limit:
                return Piece(piece, tuple(tokens)), stop
            room = min(room - 1, room - (len(tokens) - self.limit) // 2)
        raise PromptError(
            f"{self.text[start]!r} alone takes more than {self.limit} tokens: raise chunk_tokens"
        )

    def _boundary(self, half: int, stop: int) -> int:
        """The best place to cut in [half, stop); the end, if only white space is left."""
        if _next(self.text, stop) == len(self.text):
            return len(self.text)
        for cut in CUTS:
            found = [match.end() for match in cut.finditer(self.text, half, stop)]
            if found:
                return found[-1]
        return stop


def _places(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Where in the text each of its tokens starts and ends, in characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError("this tokenizer does not say where its tokens stand: use a fast one")
    check_unicode(text, "the text")
    offsets = tokenizer(text, return_offsets_mapping=True, **LITERALLY)["offset_mapping"]
    starts = [start for start, _ in offsets]
    # up to the next one: what a tokenizer drops, an accent on its letter, is nobody's else
    return starts, [*starts[1:], len(text)] if starts else []


def _next(text: str, at: int) -> int:
    """The first character from `at` on that is no white space."""
    return next((i for i in range(at, len(text)) if not text[i].isspace()), len(text))
