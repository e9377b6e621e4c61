"""LongBench v1 (Bai et al. 2023): 21 data sets, English and Chinese, cut to any length."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from engine.errors import ConfigError
from evals.longbench.cut import cut_to_length
from evals.longbench.rows import Folder, Row, rows_of, tasks_in
from evals.longbench.tasks import TASKS, fill
from evals.metrics.longbench import longbench_score
from evals.prompt import prompt_tokens
from evals.task import Sample, Turn


class LongBenchSuite:
    """LongBench's data sets, those that there are rows of.

    Args:
        folder: with files like `hotpotqa.jsonl`, or folders like `hotpotqa` that the package
            `datasets` saved; or rows by data set, such as `{"hotpotqa": datasets.load_dataset(
            "json", data_files=FILE, split="train")}`. None for the hub's.
    Raises:
        ConfigError: there are no rows.
    """

    def __init__(self, folder: Folder | None = None) -> None:
        self._folder, self._tasks = folder, tasks_in(folder)

    @property
    def tasks(self) -> Sequence[str]:
        return self._tasks

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """The first rows of a data set, at most `count`, each as long as it is.

        Of a prompt that would be longer than `length` with its answer, the middle is left out.

        Raises:
            ConfigError: no such data set, no rows or bad ones, or the length is too short for its
                instructions.
        """
        if task not in self._tasks:
            raise ConfigError(f"there are no rows of {task}, but of {', '.join(self._tasks)}")
        _check_length(tokenizer, task, length)
        index = None
        for index, row in enumerate(islice(rows_of(self._folder, task), count)):
            yield cut_to_length(tokenizer, _sample(task, length, index, row))
        if index is None:
            raise ConfigError(f"there is no row in the data of {task}")

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """0..100, see `evals.metrics.longbench.longbench_score`."""
        classes = sample.extra.get("all_classes")
        outputs = sample.turns[turn].outputs
        return 100.0 * longbench_score(sample.task, prediction, outputs, classes)


def _sample(task: str, length: int, index: int, row: Row) -> Sample:
    kind = TASKS[task]
    context, question = fill(task, row.context, row.input)
    return Sample(
        id=f"longbench/{task}/{length}/{index}",
        suite="longbench",
        task=task,
        family=kind.family,
        length=length,
        context=context,
        turns=(Turn(question, "", row.answers, kind.new_tokens),),
        chat=kind.chat,
        extra={"all_classes": list(row.all_classes)} if row.all_classes else {},
    )


def _check_length(tokenizer: Any, task: str, length: int) -> None:
    least = prompt_tokens(tokenizer, _sample(task, length, 0, Row("", "", ())))
    least += TASKS[task].new_tokens
    if length < least:
        raise ConfigError(
            f"longbench/{task}/{length} needs {least:,} tokens for its instructions and its answer "
            "alone: raise the length"
        )
