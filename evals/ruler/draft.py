"""What a task of RULER makes: a prompt in its parts, of any size that is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

from evals.ruler.templates import Template


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt in the three parts of its template, and its answers.

    Args:
        depth: where the needle that is asked for lies, 0 (first) to 1; None where not just one is.
    """

    context: str
    question: str
    prefix: str
    outputs: tuple[str, ...]
    depth: float | None = None

    @classmethod
    def of(
        cls, template: Template, outputs: Sequence[str], depth: float | None = None, **slots: object
    ) -> "Draft":
        """The template with its slots filled."""
        context, question, prefix = (part.format(**slots) for part in template)
        return cls(context, question, prefix, tuple(outputs), depth)

    @property
    def text(self) -> str:
        return self.context + self.question + self.prefix


@runtime_checkable
class Recipe(Protocol):
    """How to make the prompts of one task.

    draft: the prompt number `index` at a size: words, lines, or documents, as the task has it. The
        same for the same state of `rng`; sizes differ in what surrounds the answer, not in it.
    least, most: sizes that can be asked for; no limit where `most` is None.
    """

    @property
    def least(self) -> int: ...
    @property
    def most(self) -> int | None: ...
    def draft(self, rng: Random, index: int, size: int) -> Draft: ...


def insert(lines: Sequence[str], extra: Sequence[str], places: Sequence[int]) -> list[str]:
    """Lines with more of them in between.

    Args:
        places: ascending; `extra[i]` comes before what is `lines[places[i]]`.
    """
    merged, last = [], 0
    for line, place in zip(extra, places, strict=True):
        merged += [*lines[last:place], line]
        last = place
    return [*merged, *lines[last:]]
