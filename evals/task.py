"""The seam of the harness: what is asked of a model, whoever made the question up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Turn:
    """One question about a context, and what its answer is compared with.

    Args:
        question: the text between the context and the answer.
        prefix: the beginning of the answer, given to the model; not part of its prediction.
        outputs: references; which of them must be found is the metric's matter.
        max_new_tokens: of the answer.
        stop: texts at which the answer ends, beside the model's own end.
    """

    question: str
    prefix: str
    outputs: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One context, read once, and the questions about it, each asked on its own.

    Args:
        id: names suite, task, length and number, whatever its text is made of.
        family: what is tested (`single needle`, `multi-key`, `tracing`, `aggregation`, `QA`, ...):
            scores are averaged within families only.
        length: tokens that were asked for, all of the longest turn's prompt and its answer.
        context: the prompt up to the question; with a question and its prefix, the whole prompt.
        chat: whether the prompt goes through the tokenizer's chat template, where it has one.
        extra: what a metric needs beside the outputs, and what a plot needs (e.g. `depth`, 0..1).
    """

    id: str
    suite: str
    task: str
    family: str
    length: int
    context: str
    turns: tuple[Turn, ...]
    chat: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Suite(Protocol):
    """Tasks that belong together, made or read for one tokenizer.

    samples: those of one task, the same for the same arguments in every process; numbered from 0,
        so that more of them begin with the same ones. Raises `engine.errors.ConfigError` where
        the length is too short for the task, or data is missing.
    score: of a raw prediction, 0..100.
    """

    @property
    def tasks(self) -> Sequence[str]: ...
    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]: ...
    def score(self, sample: Sample, turn: int, prediction: str) -> float: ...
