"""What a step is to do, and what a job found when it was started."""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.service.job import Job


class Started(NamedTuple):
    """What a job found when it got its place.

    Args:
        done: prompt tokens that are in the cache, or will be when `ready` is said.
        ready: False while they are being loaded.
    """

    done: int
    ready: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, in the order in which it is carried out: memory is free before it is used."""

    out: tuple[Job, ...] = ()  # move their KV down
    back: tuple[Job, ...] = ()  # bring it back; `Scheduler.arrived` when it is there
    decode: tuple[Job, ...] = ()  # one token each
    prompt: tuple[tuple[Job, int], ...] = ()  # so many tokens of their prompts

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(count for _, count in self.prompt)


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    left: int  # tokens
    out: list[Job] = field(default_factory=list)
    back: list[Job] = field(default_factory=list)
    decode: list[Job] = field(default_factory=list)
    prompt: dict[Job, int] = field(default_factory=dict)
    held_up: bool = False  # nobody may come back or start any more

    def plan(self) -> Plan:
        out, back, decode = tuple(self.out), tuple(self.back), tuple(self.decode)
        return Plan(out, back, decode, tuple(self.prompt.items()))
