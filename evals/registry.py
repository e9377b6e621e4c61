"""Suites and measurements by name, and the data that they are made of."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from engine.errors import ConfigError
from evals.facts import digest
from evals.record import Record
from evals.settings import RunSettings
from evals.task import Suite

Measure: TypeAlias = Callable[..., Iterator[Record]]


class Kind(NamedTuple):
    """A suite: where its class is, and which settings it takes by name."""

    module: str
    name: str
    takes: tuple[str, ...]


SUITES = {
    "needle": Kind("evals.needle", "NeedleSuite", ("seed", "haystack")),
    "multiturn": Kind("evals.multiturn", "MultiTurnSuite", ("seed", "haystack")),
    "extraction": Kind("evals.extraction", "ExtractionSuite", ("seed", "haystack")),
    "ruler": Kind("evals.ruler", "RulerSuite", ("seed", "haystack", "squad", "hotpotqa")),
    "rag": Kind("evals.rag", "RagSuite", ("seed", "haystack", "musique")),
    "longbench": Kind("evals.longbench", "LongBenchSuite", ("longbench",)),
    "longbench-v2": Kind("evals.longbench", "LongBenchV2Suite", ("longbench_v2",)),
}
MEASUREMENTS = {"fidelity": "evals.fidelity", "speed": "evals.speed"}
MEASURED = "needle"  # what is measured on where nothing else is named
HUBS = {"longbench": "hub:THUDM/LongBench", "longbench_v2": "hub:THUDM/LongBench-v2"}  # defaults
FOLDERS = ("longbench", "longbench_v2")  # settings that suites know as their `folder`
# settings whose default is in `$HEADRACE_DATA`, and the task that each is for
IN_DATA = {"squad": "qa_1", "hotpotqa": "qa_2", "musique": "musique"}


class Asked(NamedTuple):
    """What a name in `RunSettings.suite` stands for: a suite, or a measurement on its samples."""

    suite: str
    measurement: str | None


def parse(name: str) -> Asked:
    """A suite's name, or "fidelity" or "speed", with ":SUITE" or without. ConfigError else."""
    first, _, rest = name.partition(":")
    asked = Asked(rest or MEASURED, first) if first in MEASUREMENTS else Asked(name, None)
    if asked.suite not in SUITES:
        raise ConfigError(
            f"no suite {name!r}; there are {', '.join((*SUITES, *MEASUREMENTS))}, and "
            "fidelity:SUITE and speed:SUITE"
        )
    return asked


def make_suite(name: str, settings: RunSettings) -> Suite:
    """A suite with the seed and the data of a run. ConfigError where its data is missing."""
    if name not in SUITES:
        raise ConfigError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    kind = SUITES[name]
    made: Suite = getattr(importlib.import_module(kind.module), kind.name)(
        **{("folder" if key in FOLDERS else key): _value(settings, key) for key in kind.takes}
    )
    return made


def measurement(name: str, *, per_head: bool = False) -> Measure:
    """`measure(engine, sample, ways)` of a measurement; `per_head` is a matter of fidelity."""
    found: Measure = importlib.import_module(MEASUREMENTS[name]).measure
    return partial(found, per_head=True) if per_head and name == "fidelity" else found


def data_digests(names: Iterable[str], settings: RunSettings) -> dict[str, str]:
    """SHA-256 of the data that the tasks of some suites are made of, by setting.

    A name that is no path, as of a data set on the hub, stands for itself.
    """
    takes = {key for name in names for key in SUITES[name].takes} - {"seed"}
    found = {key: _source(settings, key) for key in sorted(takes) if _used(settings, key)}
    paths = {key: Path(value) for key, value in found.items() if value is not None}
    return {key: digest(p) if p.exists() else str(p) for key, p in paths.items()}


def _used(settings: RunSettings, key: str) -> bool:
    """Whether any task that is asked for is made of it."""
    return not settings.tasks or key not in IN_DATA or IN_DATA[key] in settings.tasks


def _source(settings: RunSettings, key: str) -> str | None:
    """Where data comes from; None for what comes along or is the suite's to find."""
    given: str | None = getattr(settings, key)
    if given is None and key in IN_DATA and (data := os.environ.get("HEADRACE_DATA")):
        return str(Path(data, key)) if Path(data, key).exists() else None
    return HUBS.get(key) if given is None else given


def _value(settings: RunSettings, key: str) -> Any:
    value = getattr(settings, key)
    if key == "haystack" and value is not None:
        return _text(value)
    return Path(value) if value is not None and key in FOLDERS else value


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: convert it first") from error
