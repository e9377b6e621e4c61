"""Files of predictions scored anew, without a model: as a run, RULER, or LongBench leaves them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from engine.errors import ConfigError
from evals.metrics import longbench_score, longbench_v2_score, ruler_score
from evals.record import RECORDS, Record, read_records
from evals.rows import read_rows
from evals.task import Sample, Turn

Row: TypeAlias = Mapping[str, Any]
CHOICES = ("A", "B", "C", "D")


class Group(NamedTuple):
    """What a mean is taken over; the last three are None but for records of a run."""

    suite: str
    task: str
    length: int | None = None
    method: str | None = None
    budget: float | None = None


class Score(NamedTuple):
    """The mean of a group.

    Args:
        empty: samples with nothing predicted.
        score: 0..100, rounded to two places, as RULER and LongBench do.
    """

    group: Group
    samples: int
    empty: int
    score: float


class _Judged(NamedTuple):
    group: Group
    prediction: str
    score: float


def score_file(path: Path, task: str | None = None) -> list[Score]:
    """The scores of a file, in the order in which its groups come up.

    Args:
        path: folder of a run or its records; or JSON lines with a prediction (`pred`,
            `prediction`, or `response`) beside `outputs` (RULER), `answers` (LongBench), or
            `answer` (LongBench v2).
        task: of all rows; by default their `task` or `dataset`, else the file's name. Not for
            records of a run.
    Raises:
        ConfigError: the file is of no such form, or a row lacks something.
    """
    folder = path if path.is_dir() else path.parent if path.name == RECORDS else None
    records: Iterable[Record]
    if folder is not None:
        records = read_records(folder)
    else:
        rows = read_rows(path)
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise ConfigError(f"{path} has no rows to score")
        if not {"suite", "method", "turn"} <= rows[0].keys():
            return _means(_rows(path, rows, task))
        records = _as_records(path, rows)
    if task is not None:
        raise ConfigError(f"{path} is of a run, which knows the task of each record: omit --task")
    return _means(_records(records))


def _means(judged: Iterable[_Judged]) -> list[Score]:
    groups: dict[Group, list[_Judged]] = {}
    for one in judged:
        groups.setdefault(one.group, []).append(one)
    return [
        Score(
            group,
            len(found),
            sum(not x.prediction.strip() for x in found),
            round(fmean(x.score for x in found), 2),
        )
        for group, found in groups.items()
    ]


def _records(records: Iterable[Record]) -> Iterator[_Judged]:
    """Those with a score, which is found again by the suite that they are of; one of each key."""
    # torch comes with it, for which files of predictions must not wait
    from evals.registry import make_suite
    from evals.settings import RunSettings

    suites = {}
    scored = {record.key: record for record in records if record.score is not None}
    for record in scored.values():
        if record.suite not in suites:
            suites[record.suite] = make_suite(record.suite, RunSettings(suite=(record.suite,)))
        score = suites[record.suite].score(_sample(record), 0, record.prediction)
        for column in _columns(record):
            group = Group(record.suite, column, record.length, record.method, record.budget)
            yield _Judged(group, record.prediction, score)


def _columns(record: Record) -> tuple[str, ...]:
    """What a record counts for: its task; of LongBench v2, the columns of its table."""
    if record.suite != "longbench-v2":
        return (record.task,)
    return ("overall", str(record.extra.get("difficulty")), record.task)


def _as_records(path: Path, rows: list[Row]) -> list[Record]:
    try:
        return msgspec.convert(rows, list[Record])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} has rows that are no records of a run: {error}") from error


def _sample(record: Record) -> Sample:
    """What scores are made from, its turn alone: what was asked is not kept, nor does it matter."""
    turn = Turn("", "", record.outputs, 1)
    return Sample(
        id=record.id,
        suite=record.suite,
        task=record.task,
        family=record.family,
        length=record.length,
        context="",
        turns=(turn,),
        extra=record.extra,
    )


class _Ruler(msgspec.Struct, frozen=True):
    outputs: tuple[str, ...]
    pred: str


class _LongBench(msgspec.Struct, frozen=True):
    answers: tuple[str, ...]
    pred: str
    all_classes: tuple[str, ...] | None = None


class _LongBenchV2(msgspec.Struct, frozen=True):
    answer: str
    pred: str
    difficulty: Literal["easy", "hard"]
    length: Literal["short", "medium", "long"]


def _rows(path: Path, rows: Iterable[Row], task: str | None) -> Iterator[_Judged]:
    for number, row in enumerate(rows, 1):
        name = task or row.get("task") or row.get("dataset") or path.stem
        try:
            if not isinstance(name, str):
                raise ConfigError(f"its task is a name, got {name!r}")
            yield from _judged(row, name)
        except (msgspec.ValidationError, ConfigError) as error:
            raise ConfigError(f"{path}, row {number}: {error}") from error


def _judged(row: Row, task: str) -> Iterator[_Judged]:
    said = next((row[key] for key in ("response", "prediction", "pred") if key in row), None)
    if said in CHOICES and "answer" in row:  # LongBench v2 leaves the choice that it found
        said = f"The correct answer is ({said})"
    found = {**row, "pred": said}
    if "outputs" in row:
        ruler = msgspec.convert(found, _Ruler)
        score = ruler_score(task, ruler.pred, ruler.outputs)
        yield _Judged(Group("ruler", task), ruler.pred, score)
    elif "answers" in row:
        bench = msgspec.convert(found, _LongBench)
        score = 100 * longbench_score(task, bench.pred, bench.answers, bench.all_classes)
        yield _Judged(Group("longbench", task), bench.pred, score)
    elif "answer" in row:
        choice = msgspec.convert(found, _LongBenchV2)
        score = 100 * longbench_v2_score(choice.pred, choice.answer)
        for column in ("overall", choice.difficulty, choice.length):
            yield _Judged(Group("longbench-v2", column), choice.pred, score)
    else:
        raise ConfigError("it needs outputs (RULER), answers (LongBench), or answer (LongBench v2)")
