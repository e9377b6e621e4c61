"""A prompt whose parts are known: instructions, chunks that may be reused anywhere, a question."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import NamedTuple, final

import numpy as np
from torch import Tensor

from engine.errors import PromptError

Tokens = tuple[int, ...]


class Span(NamedTuple):
    """Where a chunk lies in the flat prompt."""

    start: int
    stop: int


@final
@dataclass(frozen=True, slots=True, init=False)
class Segments:
    """A prompt in parts, all of them token ids.

        prefix | chunk | separator | chunk | separator | ... | question

    Args:
        prefix: what every chunk is computed behind: the start-of-text token and instructions.
        chunks: in the order in which the model reads them; they may repeat.
        question: what follows; always computed afresh.
        separator: after every chunk; always computed afresh.
    Raises:
        PromptError: an empty question or chunk, or something that is no token id.
    """

    prefix: Tokens
    chunks: tuple[Tokens, ...]
    question: Tokens
    separator: Tokens
    tokens: Tokens = field(init=False, repr=False, compare=False)  # the flat prompt
    spans: tuple[Span, ...] = field(init=False, repr=False, compare=False)  # of the chunks

    def __init__(
        self,
        prefix: Sequence[int],
        chunks: Sequence[Sequence[int]],
        question: Sequence[int],
        separator: Sequence[int] = (),
    ) -> None:
        parts = {"prefix": prefix, "question": question, "separator": separator}
        given = {name: ids_of(part) for name, part in parts.items()}
        whole = tuple(ids_of(chunk) for chunk in chunks)
        if not given["question"]:
            raise PromptError("the question is empty: at least one token must follow the chunks")
        if () in whole:
            raise PromptError(f"chunk {whole.index(())} is empty: at least one token is needed")
        tokens, spans = [*given["prefix"]], []
        for chunk in whole:
            spans.append(Span(len(tokens), len(tokens) + len(chunk)))
            tokens += [*chunk, *given["separator"]]
        flat = (*tokens, *given["question"])
        for name, value in (given | dict(chunks=whole, tokens=flat, spans=tuple(spans))).items():
            object.__setattr__(self, name, value)

    @property
    def context(self) -> Tokens:
        """All before the question."""
        return self.tokens[: len(self.tokens) - len(self.question)]

    def ordered(self, order: Sequence[int]) -> "Segments":
        """The same with some of its chunks in another order: by their numbers here."""
        chunks = [self.chunks[number] for number in order]
        return Segments(self.prefix, chunks, self.question, self.separator)


def digest(*parts: Sequence[int]) -> bytes:
    """SHA-256 of token lists, which says where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        ids = np.asarray(part, np.int64).astype("<u4")
        whole.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return whole.digest()


def ids_of(tokens: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Token ids as plain integers. PromptError for anything else."""
    try:
        return tuple(index(token) for token in tokens)
    except TypeError as error:
        raise PromptError(f"token ids are whole numbers: {error}") from error
