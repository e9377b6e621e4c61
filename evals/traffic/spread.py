"""Positive numbers with a given mean and coefficient of variation, and a few shapes to draw from.

All are fitted by the method of moments: two numbers determine them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError

Kind: TypeAlias = Literal["gamma", "lognormal", "zipf"]
Floats: TypeAlias = NDArray[np.float64]

LEAST = 0.5  # where a Zipf law begins: what rounds to 1
STEEPEST = 20.0  # all ones, nearly
LONGEST = math.log(1e6)  # the largest value is so many times the mean, at most


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean, a coefficient of variation (deviation over mean), and the shape that has them.

    Args:
        kind: "gamma": waiting times, bursts where cv > 1. "lognormal": lengths. "zipf": lengths
            too, with a heavier tail that ends: x^-s up to some largest x; its cv is 0.58 or more.
    """

    mean: float
    cv: float
    kind: Kind = "lognormal"

    def __post_init__(self) -> None:
        if not (self.mean > 0 and self.cv >= 0 and math.isfinite(self.mean + self.cv)):
            raise ConfigError(f"needs a mean above 0 and a cv of 0 or more, got {self}")

    def draw(self, dice: np.random.Generator, count: int) -> Floats:
        """So many of them, independent. ConfigError where the shape has no such mean and cv."""
        try:
            found = _DRAWN[self.kind](self, dice, count)
        except ConfigError:
            raise
        except (ArithmeticError, ValueError) as error:
            raise ConfigError(f"{self} is out of the range of numbers: {error}") from error
        if not np.isfinite(found).all():
            raise ConfigError(f"{self} is out of the range of numbers")
        return found

    def lengths(self, dice: np.random.Generator, count: int) -> list[int]:
        """The same, rounded; at least 1."""
        rounded = np.rint(self.draw(dice, count))
        return [max(1, int(x)) for x in rounded]


def measured(values: Floats | Sequence[float] | Sequence[int], kind: Kind = "lognormal") -> Spread:
    """The spread that has the mean and the cv of these values.

    Raises:
        ConfigError: there are none, or their mean is 0.
    """
    if not len(values):
        raise ConfigError("a mean needs one value at least, got none")
    mean = float(np.mean(values))
    return Spread(mean, float(np.std(values)) / mean if mean else 0.0, kind)


def _gamma(spread: Spread, dice: np.random.Generator, count: int) -> Floats:
    if not spread.cv:
        return np.full(count, spread.mean)
    shape = spread.cv**-2
    return dice.gamma(shape, spread.mean / shape, count)


def _lognormal(spread: Spread, dice: np.random.Generator, count: int) -> Floats:
    variance = math.log1p(spread.cv**2)
    return dice.lognormal(math.log(spread.mean) - variance / 2, math.sqrt(variance), count)


def _zipf(spread: Spread, dice: np.random.Generator, count: int) -> Floats:
    """By inversion of the density x^-s between `LEAST` and the largest value."""
    if spread.mean <= LEAST:
        raise ConfigError(f"a Zipf law begins at {LEAST}, got a mean of {spread.mean}")
    flattest = 2 * spread.mean - LEAST  # where s is 0
    largest = math.exp(
        _bisected(
            lambda x: _zipf_cv(spread.mean, math.exp(x)),
            spread.cv,
            math.log(flattest),
            math.log(flattest) + LONGEST,
        )
    )
    steepness = _steepness(spread.mean, largest)
    share = dice.random(count) * _power_integral(-steepness, largest)
    if abs(steepness - 1) < 1e-9:
        return LEAST * np.exp(share)
    exponent = 1 - steepness
    return (share * exponent + LEAST**exponent) ** (1 / exponent)


def _zipf_cv(mean: float, largest: float) -> float:
    steepness = _steepness(mean, largest)
    square = _power_integral(2 - steepness, largest) / _power_integral(-steepness, largest)
    return math.sqrt(square / mean**2 - 1)


def _steepness(mean: float, largest: float) -> float:
    """Of the Zipf law up to `largest` that has this mean."""

    def lowered(steepness: float) -> float:
        whole = _power_integral(-steepness, largest)
        return -_power_integral(1 - steepness, largest) / whole

    return _bisected(lowered, -mean, 0.0, STEEPEST)


def _power_integral(power: float, upto: float) -> float:
    """Of x^power from `LEAST` on."""
    if abs(power + 1) < 1e-9:
        return math.log(upto / LEAST)
    return (upto ** (power + 1) - LEAST ** (power + 1)) / (power + 1)


def _bisected(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a rising function has a value. ConfigError where that is outside of the range."""
    least, most = rising(low), rising(high)
    slack = 1e-9 * abs(wanted)
    if not least - slack <= wanted <= most + slack:
        raise ConfigError(f"a Zipf law has {least:.2f} to {most:.2f} here, not {wanted:.2f}")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


_DRAWN: dict[Kind, Callable[[Spread, np.random.Generator, int], Floats]] = {
    "gamma": _gamma,
    "lognormal": _lognormal,
    "zipf": _zipf,
}
