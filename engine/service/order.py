"""Who comes first: the policies of the scheduler."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from enum import Enum
from typing import Protocol, runtime_checkable

from engine.errors import ConfigError
from engine.service.job import Job, State

PROMPT_COST, ANSWER_COST = 1, 2  # of a token computed, and of one generated


class Note(Enum):
    """What a policy is told of a job."""

    ADDED = "added"  # to the line, or back to it
    STARTED = "started"  # has its place, and `prompt - done` tokens to compute
    TOKEN = "token"  # one was generated
    ENDED = "ended"  # its state is still the one it ends in


@runtime_checkable
class Policy(Protocol):
    """The seam: an order of jobs. It may change between steps, and whenever somebody starts."""

    def rank(self, job: Job) -> tuple[int, ...]:
        """Smaller comes first: to tokens, to a place, and back; the largest goes out first.

        No two are equal. The state of a job may be part of it.
        """

    def preempts(self, waiting: Job, running: Job) -> bool:
        """Whether `running` may be moved down for `waiting`, which is first in line."""

    def heard(self, note: Note, job: Job) -> None:
        """Something happened to a job."""

    def tick(self, idle: Iterable[Job]) -> None:
        """A step begins; these got nothing in the last one, and wait for a place or for tokens."""


class FCFS:
    """First come, first served. Nobody overtakes, and whoever waits takes nothing from who runs.

    A job waits for those that came before it, and for nobody else.
    """

    def rank(self, job: Job) -> tuple[int, ...]:
        return (job.arrival,)

    def preempts(self, waiting: Job, running: Job) -> bool:
        return False

    def heard(self, note: Note, job: Job) -> None:
        """Arrival is all that counts."""

    def tick(self, idle: Iterable[Job]) -> None:
        """Time changes nothing."""


class Fair:
    """Priorities, and within one the tenant that got least (VTC, Sheng et al. 2024, Algorithm 2).

    A tenant's counter is what its jobs cost: 1 for each prompt token to compute, charged when the
    job starts, and 2 for each token generated. A tenant of whom nobody waited is lifted to the
    lowest counter of those that wait, or to that of whoever left the line last: idling saves
    nothing up.

    *Fairness.* Of tenants that both have jobs waiting, of one priority and none of them aged, the
    counters differ by at most P + N·A <= 2 max(P, N·A), with P the largest prompt, A the largest
    answer at 2 a token, and N the most jobs of a tenant that are started at once. For a tenant f
    count what its started jobs may still generate: c*. Only a start of f raises c*, to at most
    c + P + N·A, and f starts only while its c is the lowest in line. The lift keeps that.

    *Waiting.* Of the jobs of one tenant and priority that got nothing in a step, the first ages;
    with every `aging_steps` such steps it rises one class, for good. So a job that was first for n
    steps is overtaken only by those that were for more than
    n - (highest priority - own + 1) x `aging_steps`: from some step on by nobody who comes later.
    Those before it end, and nobody starts before a job that is first and lacks a place.

    A waiting job moves down running ones whose class, age included, is below its own priority,
    age not included.

    Raises:
        ConfigError: if `aging_steps` is less than 1.
    """

    def __init__(self, aging_steps: int) -> None:
        if aging_steps < 1:
            raise ConfigError(f"aging_steps must be at least 1, got {aging_steps}")
        self.counters: defaultdict[str, int] = defaultdict(int)
        self._aging_steps = aging_steps
        self._age: Counter[Job] = Counter()
        self._waiting: Counter[str] = Counter()  # jobs of tenants that have any
        self._last = ""  # tenant that left the line last

    def rank(self, job: Job) -> tuple[int, ...]:
        waits = job.state is State.WAITING  # unfinished prompts come before new ones
        return (-self.class_of(job), waits, self.counters[job.tenant], job.arrival)

    def preempts(self, waiting: Job, running: Job) -> bool:
        return self.class_of(running) < waiting.priority

    def class_of(self, job: Job) -> int:
        """Its priority, and one more for every `aging_steps` steps it waited first in line."""
        return job.priority + self._age[job] // self._aging_steps

    def heard(self, note: Note, job: Job) -> None:
        if note is Note.ADDED:
            self._lift(job.tenant)
            self._waiting[job.tenant] += 1
        elif note is Note.STARTED:
            self.counters[job.tenant] += PROMPT_COST * (job.prompt - job.done)
            self._leave(job.tenant)
        elif note is Note.TOKEN:
            self.counters[job.tenant] += ANSWER_COST
        else:
            del self._age[job]
            if job.state is State.WAITING:
                self._leave(job.tenant)

    def tick(self, idle: Iterable[Job]) -> None:
        lines: dict[tuple[str, int], Job] = {}
        for job in idle:
            first = lines.setdefault((job.tenant, job.priority), job)
            if job.arrival < first.arrival:
                lines[job.tenant, job.priority] = job
        self._age.update(lines.values())

    def _lift(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            line = [self.counters[name] for name, jobs in self._waiting.items() if jobs]
            floor = min(line) if line else self.counters[self._last]
            self.counters[tenant] = max(self.counters[tenant], floor)

    def _leave(self, tenant: str) -> None:
        self._waiting[tenant] -= 1
        self._last = tenant
