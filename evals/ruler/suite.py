"""RULER (Hsieh et al. 2024): thirteen synthetic tasks at any length, for any tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from random import Random
from typing import Any, Literal

from engine.demo.haystack import count_tokens
from engine.errors import ConfigError
from evals.fitted import fitted
from evals.metrics.ruler import ruler_score
from evals.rows import Source, default_source, read_rows
from evals.ruler.common_words import CommonWords
from evals.ruler.documents import Corpus, hotpotqa, squad
from evals.ruler.draft import Recipe
from evals.ruler.essay import Essay, essay_of
from evals.ruler.frequent_words import FrequentWords
from evals.ruler.niah import Needles, Niah
from evals.ruler.qa import Qa
from evals.ruler.tracing import Tracing
from evals.ruler.words import Words, load_words
from evals.task import Sample, Turn

FILL = 0.9  # of the length; below, what a task is made of has run out


class Sources:
    """What tasks are made of, each read when the first task needs it."""

    def __init__(self, haystack: str | None, squad: Source | None, hotpotqa: Source | None) -> None:
        self._haystack, self._squad, self._hotpotqa = haystack, squad, hotpotqa

    @cached_property
    def essay(self) -> Essay:
        return essay_of(self._haystack)

    @property
    def words(self) -> Words:
        return load_words()

    @cached_property
    def more_words(self) -> list[str]:
        """Those of the haystack that the lists have not."""
        known = set(self.words.every)
        return [x for x in self.essay.vocabulary() if x not in known]

    @cached_property
    def squad(self) -> Corpus:
        return squad(read_rows(self._squad or default_source("squad", "--squad")))

    @cached_property
    def hotpotqa(self) -> Corpus:
        return hotpotqa(read_rows(self._hotpotqa or default_source("hotpotqa", "--hotpotqa")))


@dataclass(frozen=True, slots=True)
class Cell:
    """What a task's recipe may depend on, beside what it is made of."""

    tokenizer: Any
    length: int
    new_tokens: int

    def count(self, text: str) -> int:
        """Tokens of a text alone."""
        return count_tokens(self.tokenizer, text)


@dataclass(frozen=True, slots=True)
class Task:
    """One of the thirteen.

    Args:
        words: whether it is made of words of a package, whose version then matters.
    """

    family: str
    new_tokens: int
    recipe: Callable[[Sources, Cell], Recipe]
    words: bool = False


def _needles(family: str, needles: Needles) -> Task:
    worded = "words" in (needles.key, needles.value)

    def recipe(sources: Sources, cell: Cell) -> Recipe:
        return Niah(needles, sources.essay, sources.words if worded else None)

    return Task(family, 128, recipe, worded)


def _tracing(sources: Sources, cell: Cell) -> Recipe:
    return Tracing.make(cell.count)


def _common_words(sources: Sources, cell: Cell) -> Recipe:
    return CommonWords(cell.length, sources.words.every, sources.more_words)


def _frequent_words(sources: Sources, cell: Cell) -> Recipe:
    return FrequentWords.make(cell.length, cell.new_tokens)


def _qa(corpus: Literal["squad", "hotpotqa"], sources: Sources, cell: Cell) -> Recipe:
    return Qa(getattr(sources, corpus))


TASKS = {
    "niah_single_1": _needles("single needle", Needles("noise")),
    "niah_single_2": _needles("single needle", Needles("essay")),
    "niah_single_3": _needles("single needle", Needles("essay", value="uuids")),
    "niah_multikey_1": _needles("multi-key", Needles("essay", keys=4)),
    "niah_multikey_2": _needles("multi-key", Needles("needle")),
    "niah_multikey_3": _needles("multi-key", Needles("needle", key="uuids", value="uuids")),
    "niah_multivalue": _needles("multi-value", Needles("essay", values=4)),
    "niah_multiquery": _needles("multi-query", Needles("essay", keys=4, queries=4)),
    "vt": Task("tracing", 30, _tracing),
    "cwe": Task("aggregation", 120, _common_words, words=True),
    "fwe": Task("aggregation", 50, _frequent_words),
    "qa_1": Task("QA", 32, partial(_qa, "squad")),
    "qa_2": Task("QA", 32, partial(_qa, "hotpotqa")),
}


class RulerSuite:
    """RULER's tasks, by our own generators.

    Sample `index` of a task has the same needles, words or question at every length; but `cwe` has
    other words below 4,096 tokens, and where its list takes more than there are in the package.

    Args:
        haystack: text that needles are hidden in; by default the reference pages of the
            Python language, as the release of Python has them.
        squad, hotpotqa: see `evals.rows.read_rows`; by default `$HEADRACE_DATA/squad` and
            `$HEADRACE_DATA/hotpotqa`.
        chat: whether the prompts go through the tokenizer's chat template, where it has one.
    """

    def __init__(
        self,
        seed: int = 42,
        haystack: str | None = None,
        squad: Source | None = None,
        hotpotqa: Source | None = None,
        *,
        chat: bool = True,
    ) -> None:
        self.seed, self.chat = seed, chat
        self._sources = Sources(haystack, squad, hotpotqa)

    @property
    def tasks(self) -> Sequence[str]:
        return tuple(TASKS)

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """As `evals.task.Suite` has it; less than a line or document of the length stays free.

        Raises:
            ConfigError: no such task, its data is missing, or a sample cannot be of that length.
        """
        if task not in TASKS:
            raise ConfigError(f"RULER has no task {task}; it has {', '.join(TASKS)}")
        kind = TASKS[task]
        cell = Cell(tokenizer, length, kind.new_tokens)
        recipe = kind.recipe(self._sources, cell)
        size = None
        for index in range(count):
            make = partial(self._sample, recipe, task, length, index)
            sample, size = fitted(tokenizer, make, recipe.least, recipe.most, size, FILL)
            yield sample

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """0..100, see `evals.metrics.ruler.ruler_score`."""
        return ruler_score(sample.task, prediction, sample.turns[turn].outputs)

    def _sample(self, recipe: Recipe, task: str, length: int, index: int, size: int) -> Sample:
        kind = TASKS[task]
        draft = recipe.draft(Random(f"{self.seed} {task} {index}"), index, size)
        extra: dict[str, Any] = {} if draft.depth is None else {"depth": draft.depth}
        if kind.words:
            extra["words"] = self._sources.words.origin
        return Sample(
            id=f"ruler/{task}/{length}/{index}",
            suite="ruler",
            task=task,
            family=kind.family,
            length=length,
            context=draft.context,
            turns=(Turn(draft.question, draft.prefix, draft.outputs, kind.new_tokens),),
            chat=self.chat,
            extra=extra,
        )
