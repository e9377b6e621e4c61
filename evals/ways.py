"""How every question is answered: densely, by methods at budgets, and without its context."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.method import PRESETS, Method, preset
from evals.record import NO_CONTEXT
from evals.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Way:
    """A method at a budget, under the name that records have for it.

    Args:
        name: of a preset, or `NO_CONTEXT`.
        budget: None for dense and for the floor.
    """

    name: str
    budget: float | None
    method: Method


DENSE = Way("dense", None, preset("dense"))
FLOOR = Way(NO_CONTEXT, None, preset("dense"))


def ways(settings: RunSettings) -> list[Way]:
    """Dense first, which always runs, then every method at every budget.

    Raises:
        ConfigError: no such method, a budget out of range, or a setting that a method has not.
    """
    if unused := settings.settings.keys() - set(settings.method):
        raise ConfigError(f"settings are given for {', '.join(sorted(unused))}, which does not run")
    return [DENSE, *_sparse(settings)]


def _sparse(settings: RunSettings) -> Iterator[Way]:
    budgets = list(dict.fromkeys(settings.budget))
    for name in dict.fromkeys(settings.method):
        changes = settings.settings.get(name, {})
        if "budget" in changes:
            raise ConfigError(f"settings.{name} has a budget: name budgets with budget")
        if "index" in changes or (name == "dense" and changes):
            raise ConfigError(f"settings.{name} cannot change what it is: name another method")
        if name not in PRESETS:
            raise ConfigError(f"no method {name!r}; there are {', '.join(PRESETS)}")
        if name != "dense":
            if not budgets:
                raise ConfigError(f"budget is missing: {name} needs one or more")
            yield from (Way(name, b, preset(name, budget=b, **changes)) for b in budgets)
