"""LongBench v2 (Bai et al. 2024): 503 questions about long texts, each with four choices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from engine.errors import ConfigError
from evals.longbench.cut import cut_to_length
from evals.longbench.rows import checked
from evals.metrics.longbench_v2 import longbench_v2_score
from evals.rows import read_rows
from evals.task import Sample, Turn

Source: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
HUB = "THUDM/LongBench-v2"
NEW_TOKENS = 128
TASKS = ("short", "medium", "long")  # the texts, as LongBench v2 sorts them


class Row(msgspec.Struct, frozen=True):
    """A question, of which more columns are known than are needed here."""

    domain: str
    difficulty: Literal["easy", "hard"]
    length: Literal["short", "medium", "long"]
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str


class LongBenchV2Suite:
    """LongBench v2 without chains of thought, a task for each class of lengths.

    Args:
        folder: with its `data.json`, or what the package `datasets` saved; that file; or rows.
            None for the hub's.
    """

    def __init__(self, folder: Source | None = None) -> None:
        self._source: Source = HUB if folder is None else folder

    @property
    def tasks(self) -> Sequence[str]:
        return TASKS

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """The first questions of a task, at most `count`; long prompts lose their middle.

        Raises:
            ConfigError: no such task, no such data, or the length leaves no room for a prompt.
        """
        if task not in TASKS:
            raise ConfigError(f"LongBench v2 has no task {task}; it has {', '.join(TASKS)}")
        rows = [row for row in self._rows if row.length == task]
        for index, row in enumerate(rows[:count]):
            yield cut_to_length(tokenizer, _sample(task, length, index, row))

    @cached_property
    def _rows(self) -> list[Row]:
        rows = list(checked(read_rows(self._source), Row, "data"))
        if not rows:
            raise ConfigError(f"{self._source} has no rows of LongBench v2")
        return rows

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """100 where the right choice is named, else 0."""
        return 100.0 * longbench_v2_score(prediction, sample.turns[turn].outputs[0])


def _sample(task: str, length: int, index: int, row: Row) -> Sample:
    before, after = _prompt().split("$DOC$")
    return Sample(
        id=f"longbench-v2/{task}/{length}/{index}",
        suite="longbench-v2",
        task=task,
        family=row.domain,
        length=length,
        context=before + row.context.strip(),
        turns=(Turn(_asked(after, row), "", (row.answer,), NEW_TOKENS),),
        extra={"difficulty": row.difficulty},
    )


def _asked(text: str, row: Row) -> str:
    """A part of the prompt with the question and the choices in it, one after the other."""
    slots = {"$Q$": row.question}
    slots |= {f"$C_{letter}$": getattr(row, f"choice_{letter}") for letter in "ABCD"}
    for slot, value in slots.items():
        text = text.replace(slot, value.strip())
    return text


@cache
def _prompt() -> str:
    return files("evals.longbench").joinpath("prompt_v2.txt").read_text(encoding="utf-8")
