"""Requests over time, and what load tests change of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, and how much it asks for.

    Args:
        at_s: seconds from the first request.
        prompt_tokens: all of them, a conversation's earlier turns included.
        new_tokens: of the answer; 0 where it failed.
        session: the conversation it is a turn of; None where that is not known.
        failed: no answer came of it. A load test ends such a request from outside.
    """

    at_s: float
    prompt_tokens: int
    new_tokens: int
    session: str | None = None
    failed: bool = False


def rate(arrivals: Sequence[Arrival]) -> float:
    """Requests per second between the first and the last one.

    Raises:
        ConfigError: fewer than two requests, or all at once.
    """
    span_s = arrivals[-1].at_s - arrivals[0].at_s if arrivals else 0.0
    if span_s <= 0:
        raise ConfigError(f"a rate needs requests at two times or more, got {len(arrivals)} at one")
    return (len(arrivals) - 1) / span_s


def rescaled(arrivals: Sequence[Arrival], per_s: float) -> list[Arrival]:
    """The same requests at another rate: time runs faster or slower, bursts stay bursts."""
    if not 0 < per_s < math.inf:
        raise ConfigError(f"the rate must be above 0 requests per second, got {per_s}")
    factor, first_s = rate(arrivals) / per_s, arrivals[0].at_s
    return [replace(x, at_s=(x.at_s - first_s) * factor) for x in arrivals]


def cut(arrivals: Sequence[Arrival], positions: int, *, new_tokens: int) -> list[Arrival]:
    """Lengths that a model of so many positions serves.

    Args:
        new_tokens: the longest answer. What it leaves of `positions` is the longest prompt.
    """
    if not 0 < new_tokens < positions:
        raise ConfigError(
            f"new_tokens is {new_tokens}: it must be at least 1, and leave a prompt some of the "
            f"{positions} positions"
        )
    longest = positions - new_tokens
    return [
        replace(
            x,
            prompt_tokens=min(x.prompt_tokens, longest),
            new_tokens=min(x.new_tokens, new_tokens),
        )
        for x in arrivals
    ]
