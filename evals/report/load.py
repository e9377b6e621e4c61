"""Runs from their folders: records that belong together, and how they were made."""

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError
from evals.record import NO_CONTEXT, Key, Record, read_records

RUN = "run.json"


class Run(msgspec.Struct, frozen=True):
    """One folder of records.

    Args:
        facts: what its `run.json` says; empty where there is none.
    """

    folder: str
    facts: dict[str, Any]
    records: int


class Runs(msgspec.Struct, frozen=True):
    """Runs that are reported together.

    Args:
        records: one of each key.
        repeated: how many records gave way to a later one of the same key.
    """

    runs: tuple[Run, ...]
    records: tuple[Record, ...]
    repeated: int


class _Settings(msgspec.Struct):
    method: list[str] = []
    settings: dict[str, Any] = {}


class _Facts(msgspec.Struct):
    """What a report reads of a run's facts, as far as they are there."""

    starts: list[dict[str, Any]] = []
    settings: _Settings = msgspec.field(default_factory=_Settings)


def load_runs(folders: Sequence[str | Path]) -> Runs:
    """The records of all folders. Of two with the same key the later counts, errors only if alone.

    Raises:
        ConfigError: a folder holds no run, none has a record yet, or the runs do not belong
            together: of other models, other settings of a method, or other prompts for the same
            samples.
    """
    found = [(str(folder), read_records(folder)) for folder in folders]
    runs = tuple(Run(folder, _facts(Path(folder)), len(records)) for folder, records in found)
    for first, second in combinations([run for run in runs if run.facts], 2):
        _same_model(first, second)
        _same_methods(first, second)
    _same_prompts(found)
    every = [record for _, records in found for record in records]
    if not every:
        raise ConfigError(
            f"no records yet in {', '.join(run.folder for run in runs)}: "
            "report when the run has answered a first question"
        )
    kept = _latest(every)
    return Runs(runs, tuple(kept.values()), len(every) - len(kept))


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / RUN
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{path} must hold an object, not {type(facts).__name__}")
    try:
        msgspec.convert(facts, _Facts)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} does not say how a run was made: {error}") from error
    return facts


def _same_model(first: Run, second: Run) -> None:
    if _model(first) != _model(second):
        raise ConfigError(
            f"runs of two models: {first.facts.get('model')} ({first.facts.get('dtype')}) in "
            f"{first.folder}, {second.facts.get('model')} ({second.facts.get('dtype')}) in "
            f"{second.folder}; report them apart"
        )


def _model(run: Run) -> tuple[Any, Any]:
    """What makes a model this one: its weights, whatever its folder's name; and their dtype."""
    return run.facts.get("weights", run.facts.get("model")), run.facts.get("dtype")


def _same_methods(first: Run, second: Run) -> None:
    """A name must mean the same settings, or a table mixes two methods under it."""
    (ones, mine), (others, theirs) = _methods(first), _methods(second)
    for method in sorted(ones & others):
        if mine.get(method) != theirs.get(method):
            raise ConfigError(
                f"{method} has settings {mine.get(method, 'of its preset')} in {first.folder}, and "
                f"{theirs.get(method, 'of its preset')} in {second.folder}; report them apart"
            )


def _methods(run: Run) -> tuple[set[str], dict[str, Any]]:
    """The methods of a run, and the changed settings of some of them."""
    settings = run.facts.get("settings", {})
    return set(settings.get("method", ())), settings.get("settings", {})


def _same_prompts(found: Iterable[tuple[str, list[Record]]]) -> None:
    """Pairing is by sample: the same name must mean the same prompt."""
    prompts: dict[tuple[str, str, int], tuple[str, str]] = {}
    for folder, records in found:
        for record in records:
            if record.method == NO_CONTEXT or not record.prompt_sha256:
                continue
            name = record.suite, record.id, record.turn
            digest, where = prompts.setdefault(name, (record.prompt_sha256, folder))
            if digest != record.prompt_sha256:
                raise ConfigError(
                    f"sample {record.id} has one prompt in {where} and another in {folder}: runs "
                    "with other seeds, texts or tokenizers; report them apart"
                )


def _latest(records: Iterable[Record]) -> dict[Key, Record]:
    kept: dict[Key, Record] = {}
    for record in records:
        if record.error is None or record.key not in kept or kept[record.key].error is not None:
            kept[record.key] = record
    return kept
