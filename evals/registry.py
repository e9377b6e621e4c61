"""Suites and measurements by name, and the data that they are made of."""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from engine.errors import ConfigError
from evals.facts import digest
from evals.record import Record
from evals.ruler.essay import default_text
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


def haystack_text(settings: RunSettings) -> str | None:
    """The text that a run's suites hide needles in; None where none of them does.

    To be read once and handed on: there may be a pipe behind the name.
    """
    takes = {key for name in settings.suite for key in SUITES[parse(name).suite].takes}
    return _haystack(settings) if "haystack" in takes else None


def make_suite(name: str, settings: RunSettings, haystack: str | None = None) -> Suite:
    """A suite with the seed and the data of a run. ConfigError where its data is missing.

    Args:
        haystack: the text of `settings.haystack`, where it was read before.
    """
    if name not in SUITES:
        raise ConfigError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    kind = SUITES[name]
    values = {("folder" if x in FOLDERS else x): _value(settings, x, haystack) for x in kind.takes}
    made: Suite = getattr(importlib.import_module(kind.module), kind.name)(**values)
    return made


def measurement(name: str, *, per_head: bool = False) -> Measure:
    """`measure(engine, sample, ways)` of a measurement; `per_head` is a matter of fidelity."""
    found: Measure = importlib.import_module(MEASUREMENTS[name]).measure
    return partial(found, per_head=True) if per_head and name == "fidelity" else found


def data_digests(
    names: Iterable[str], settings: RunSettings, haystack: str | None = None
) -> dict[str, str]:
    """SHA-256 of the data that the tasks of some suites are made of, by setting.

    A name that is no path, as of a data set on the hub, stands for itself.

    Args:
        haystack: see `make_suite`.
    """
    takes = {key for name in names for key in SUITES[name].takes} - {"seed"}
    known = {}
    if "haystack" in takes:  # by its text: Python's own, too, which its releases change
        known["haystack"] = text_digest(_haystack(settings) if haystack is None else haystack)
    found = {key: _source(settings, key) for key in sorted(takes) if _used(settings, key)}
    paths = {k: Path(v) for k, v in found.items() if v is not None and k not in known}
    return known | {key: digest(p) if p.exists() else str(p) for key, p in paths.items()}


def text_digest(text: str) -> str:
    """SHA-256 of a text, which is that of a file with it."""
    return hashlib.sha256(text.encode()).hexdigest()


def _used(settings: RunSettings, key: str) -> bool:
    """Whether any task that is asked for is made of it."""
    return not settings.tasks or key not in IN_DATA or IN_DATA[key] in settings.tasks


def _source(settings: RunSettings, key: str) -> str | None:
    """Where data comes from; None for what comes along or is the suite's to find."""
    given: str | None = getattr(settings, key)
    if given is None and key in IN_DATA and (data := os.environ.get("HEADRACE_DATA")):
        return str(Path(data, key)) if Path(data, key).exists() else None
    return HUBS.get(key) if given is None else given


def _value(settings: RunSettings, key: str, haystack: str | None) -> Any:
    value = getattr(settings, key)
    if key == "haystack":
        return haystack if haystack is not None or value is None else _text(value)
    return Path(value) if value is not None and key in FOLDERS else value


def _haystack(settings: RunSettings) -> str:
    return default_text() if settings.haystack is None else _text(settings.haystack)


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: convert it first") from error
