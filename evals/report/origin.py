"""Where a report's numbers come from: what `run.json` of each run says, flat enough to read."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from evals.report.load import Run
from evals.report.summary import Summary

NO_FACTS = "run.json is missing: model, versions and hardware are not known"


class Fact(NamedTuple):
    """Something that a run says about itself."""

    name: str
    value: str


def origin(summary: Summary) -> list[Fact]:
    """Facts of all runs; where runs differ, each value with the folders that it is from."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in summary.runs:
        for fact in _facts(run):
            found.setdefault(fact.name, {}).setdefault(fact.value, []).append(run.folder)
    facts = [Fact(name, _value(values, len(summary.runs))) for name, values in found.items()]
    records = f"{summary.records:,} from {', '.join(run.folder for run in summary.runs)}"
    if summary.repeated:
        records += f"; {summary.repeated:,} more gave way to others of the same question"
    return [*facts, Fact("records", records)]


def model(summary: Summary) -> str:
    """The model's name, for a title; the last part of a path."""
    for run in summary.runs:
        if "model" in run.facts:
            return str(run.facts["model"]).rstrip("/").rsplit("/", 1)[-1]
    return "unknown model"


def _facts(run: Run) -> Iterator[Fact]:
    """The commands come first: they make the rest again."""
    if not run.facts:
        yield Fact("run", NO_FACTS)
    for start in run.facts.get("starts", ()):
        yield Fact(f"command, {start.get('date', 'no date')}", _text(start.get("command")))
    for name, value in run.facts.items():
        if name in ("versions", "commit", "hardware"):
            later = [start[name] for start in run.facts.get("starts", ()) if name in start]
            for each in dict.fromkeys(map(_text, (value, *later))):
                yield Fact(name, each)
        elif name != "starts" and value not in ({}, []):
            yield Fact(name.replace("_", " "), _text(value))


def _text(value: Any) -> str:
    """Lines of a dictionary, words of a list; what is empty is left out."""
    if isinstance(value, dict):
        return "\n".join(f"{k} {_flat(each)}" for k, each in value.items() if each not in ({}, []))
    return _flat(value)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return "–" if value is None else str(value)


def _value(values: dict[str, list[str]], runs: int) -> str:
    if sum(map(len, values.values())) == runs and len(values) == 1:
        return next(iter(values))
    return "\n".join(f"{value} ({', '.join(folders)})" for value, folders in values.items())
