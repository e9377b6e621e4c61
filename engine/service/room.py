"""Bytes of every tier that jobs hold or may come to need: what the scheduler admits by."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.errors import ConfigError, PromptTooLong
from engine.service.job import Job, State


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may compute, and all requests together may hold.

    Args:
        step_tokens: of a step; a decode counts one, as does every token of a prompt.
        max_running: jobs on the device. At most `step_tokens`: each decodes in every step.
        max_waiting: jobs without a place.
        device_bytes: KV on the device.
        lower_bytes: where KV of movable jobs may go.
        pool_bytes: where KV of sparse jobs lies.
        granule: tokens by which the memory of a job grows; None takes its whole length at once.

    Raises:
        ConfigError: for settings that contradict each other.
    """

    step_tokens: int
    max_running: int
    max_waiting: int
    device_bytes: int
    lower_bytes: int = 0
    pool_bytes: int = 0
    granule: int | None = 256

    def __post_init__(self) -> None:
        granule = 1 if self.granule is None else self.granule
        if min(self.max_running, self.max_waiting, granule) < 1:
            raise ConfigError(
                f"max_running {self.max_running}, max_waiting {self.max_waiting} and granule "
                f"{self.granule} must be at least 1"
            )
        if self.max_running > self.step_tokens:
            raise ConfigError(
                f"max_running is {self.max_running}, step_tokens {self.step_tokens}: every running "
                "request has a token in every step, so lower max_running or raise step_tokens"
            )


class Room:
    """The books of all started jobs.

    *Why somebody can always go on.* Pinned jobs hold their worst case for good; P is their sum. W
    is the worst case of a movable one. Jobs are started together only if

        (a)  P + sum of W <= device                           nobody ever has to move, or
        (b)  P + largest W <= device, and all fit below       everybody may move.

    Both survive that a job ends, or that a `whole` one is settled and becomes movable: its W goes
    from P to the others. Under (a) whoever grows finds room. Under (b) of the movable jobs that
    decode the first may send all others down, and then has its W; where none decodes, all prompts
    on the device have room, as nobody starts or comes back without leaving it to them (`place`).
    Those that cannot be moved at the moment wait for no memory: they load, arrive, or are about
    to be settled.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.device_used = self.lower_used = self.pool_used = 0

    # of one job

    def worst(self, job: Job) -> int:
        """Most bytes on the device that it may hold from now on."""
        need = job.need
        if not job.pinned:
            return _rate(job) * job.capacity + need.fixed
        if job.made:
            return need.answer * job.capacity + need.fixed
        return need.most(job.capacity)

    def size(self, job: Job, length: int) -> int:
        """Bytes on the device with room for `length` tokens."""
        if job.pinned:
            return self.worst(job)
        if (step := self.limits.granule) is None:
            length, step = job.capacity, 1
        return _rate(job) * min(-(-length // step) * step, job.capacity) + job.need.fixed

    def growth(self, job: Job) -> int:
        """Bytes until the prompt is in the cache and a granule more: less is no place to run."""
        length = max(job.prompt, job.next_length) + (self.limits.granule or 0)
        return self.size(job, length) - job.held

    def most(self, job: Job, want: int) -> int:
        """How many of `want` further tokens have room, in what it holds and what is free."""
        if job.pinned:
            return want
        room = job.held + self._free - job.need.fixed
        tokens = room // rate if (rate := _rate(job)) else job.capacity
        if tokens < job.capacity:
            tokens -= tokens % (self.limits.granule or job.capacity)
        return max(0, min(want, tokens - job.done))

    def fits(self, job: Job, length: int) -> bool:
        """Whether it may grow to `length` tokens now."""
        return self.size(job, length) - job.held <= self._free

    # of all

    def refuse(self, job: Job) -> None:
        """PromptTooLong if it could not run even alone."""
        what, has = f"a request of up to {job.capacity} tokens needs", self.limits
        if (worst := self.worst(job)) > has.device_bytes:
            raise PromptTooLong(
                f"{what} {worst} bytes of KV on the device, cache_bytes is {has.device_bytes}: "
                "raise it, or ask for less"
            )
        if (pool := _pool(job)) > has.pool_bytes:
            raise PromptTooLong(
                f"{what} {pool} bytes of KV in the pool, which has {has.pool_bytes}: raise "
                "pinned_bytes or spill_bytes, or ask for less"
            )

    def admits(self, jobs: Iterable[Job]) -> bool:
        """Whether these could be started together: their worst cases, see above."""
        jobs = list(jobs)
        pinned = sum(self.worst(job) for job in jobs if job.pinned)
        others = [self.worst(job) for job in jobs if not job.pinned]
        if sum(map(_pool, jobs)) > self.limits.pool_bytes:
            return False
        if pinned + sum(others) <= self.limits.device_bytes:
            return True
        below = sum(map(_below, jobs))
        return (
            pinned + max(others, default=0) <= self.limits.device_bytes
            and below <= self.limits.lower_bytes
        )

    def place(self, job: Job, running: Collection[Job], gone: Collection[Job] = ()) -> bool:
        """Whether it may run beside others without sending any down soon: they keep their growth.

        Args:
            running: all that hold memory of the device.
            gone: of these, whoever would be moved down for it.
        """
        if len(running) - len(gone) >= self.limits.max_running:
            return False
        kept = sum(self.growth(other) for other in running if other not in gone)
        return self.growth(job) + kept <= self._free + sum(other.held for other in gone)

    def houses(self, jobs: Iterable[Job]) -> bool:
        """Whether these may be moved down now."""
        return self.lower_used + sum(map(_below, jobs)) <= self.limits.lower_bytes

    # changes

    def enter(self, job: Job) -> None:
        """A job is started: what it may need of the pool is its own until it leaves."""
        self.pool_used += _pool(job)

    def hold(self, job: Job, length: int) -> None:
        """It has room for `length` tokens from now on."""
        size = self.size(job, length)
        self.device_used += size - job.held
        job.length, job.held = length, size

    def lower(self, job: Job) -> None:
        """It moves down."""
        self._release(job)
        self.lower_used += _below(job)

    def raised(self, job: Job) -> None:
        """It is back: what is still below may be dropped when others need it."""
        self.lower_used -= _below(job)

    def leave(self, job: Job) -> None:
        """It ends, in the state it is in."""
        if job.state is not State.WAITING:
            self.pool_used -= _pool(job)
        if job.state in (State.OUT, State.COMING):
            self.raised(job)
        self._release(job)

    def _release(self, job: Job) -> None:
        self.device_used -= job.held
        job.length = job.held = 0

    @property
    def _free(self) -> int:
        return self.limits.device_bytes - self.device_used

    def check(self, jobs: Collection[Job]) -> None:
        """AssertionError unless the books say what these started jobs hold, and budgets hold."""
        held = [self.size(job, job.length) if job.running else 0 for job in jobs]
        assert held == [job.held for job in jobs], "bytes of a job on the device"
        assert sum(held) == self.device_used <= self.limits.device_bytes, "bytes on the device"
        below = [_below(job) for job in jobs if job.state in (State.OUT, State.COMING)]
        assert sum(below) == self.lower_used <= self.limits.lower_bytes, "bytes below"
        assert sum(map(_pool, jobs)) == self.pool_used <= self.limits.pool_bytes, "bytes of a pool"
        assert self.admits(jobs), "jobs that may come to wait for each other"
        for job in jobs:
            there = job.prompt + job.made - 1 if job.made else job.done
            assert job.length >= there or job.pinned or not job.running, "tokens without room"


def _rate(job: Job) -> int:
    """Bytes of a token on the device; it never rises."""
    return job.need.answer if job.made else max(job.need.prompt, job.need.answer)


def _below(job: Job) -> int:
    """Most bytes of a movable job in lower tiers."""
    if not job.need.movable:
        return 0
    return max(job.need.prompt, job.need.answer) * job.capacity + job.need.slack


def _pool(job: Job) -> int:
    """Most bytes of a job in the pool."""
    return job.need.pool * job.capacity + job.need.slack if job.need.pool else 0
