"""A caller of the scheduler: it computes nothing, and checks every plan by books of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.service.job import Job, Need, State
from engine.service.order import Policy
from engine.service.plan import Plan, Started
from engine.service.room import Limits
from engine.service.scheduler import Scheduler

DENSE = Need(1, 1)
SPARSE = Need(3, 1, pool=2, fixed=5, movable=False)


def limits(**changes):
    """Small ones: ten tokens a step, four jobs, a hundred bytes."""
    small = dict(step_tokens=10, max_running=4, max_waiting=50, device_bytes=100, granule=1)
    return Limits(**(small | changes))


@dataclass
class Caller:
    """Carries plans out, as a service does.

    Args:
        found: what `start` answers.
        at_once: settles, loads and moves are over when the step is; else when a test says so.
    """

    scheduler: Scheduler
    found: Callable[[Job], Started] = lambda job: Started(0)
    at_once: bool = True
    jobs: list[Job] = field(default_factory=list)  # all that were added and have not ended
    starts: list[Job] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    slices: dict[Job, int] = field(default_factory=dict)  # left to read of `whole` jobs

    def add(self, prompt: int, limit: int, need: Need = DENSE, **more) -> Job:
        job = Job(len(self.jobs), more.pop("tenant", ""), prompt, limit, need, **more)
        self.scheduler.add(job)
        self.jobs.append(job)
        self.slices[job] = prompt
        return job

    def step(self) -> Plan:
        scheduler = self.scheduler
        before = [job for job in self.jobs if job.state is State.DECODE and job.made < job.limit]
        plan = scheduler.next(self._start)
        scheduler.check()
        self._look(plan, before)
        scheduler.done(plan)
        for job, count in plan.prompt:
            self.slices[job] -= count
        for job in [*self.jobs]:
            if job.made == job.limit:
                self.finish(job)
            elif self.at_once:
                self.help(job)
        scheduler.check()
        self.plans.append(plan)
        return plan

    def help(self, job: Job) -> None:
        """What this job waits for, other than a step, happens."""
        if job.state is State.COMING:
            self.scheduler.arrived(job)
        elif job.state is State.PROMPT and not job.ready:
            self.scheduler.ready(job)
        elif self.complete(job):
            self.scheduler.settled(job)

    def complete(self, job: Job) -> bool:
        read = self.slices[job] <= 0 if job.whole else job.done == job.prompt
        return job.state is State.PROMPT and read and job.ready

    def finish(self, job: Job) -> None:
        self.scheduler.finish(job)
        if job in self.jobs:
            self.jobs.remove(job)

    def run(self) -> None:
        """Steps until everything is over."""
        self.until(lambda: not self.jobs)

    def until(self, seen: Callable[[], object], most: int = 1000) -> Plan:
        """Steps until something is seen; the last of them."""
        for _ in range(most):
            plan = self.step()
            if seen():
                return plan
        raise AssertionError(f"not seen in {most} steps: {self.jobs}")

    def _start(self, job: Job) -> Started:
        assert job.state is State.PROMPT
        assert self.used() <= self.scheduler.limits.device_bytes
        started = [other for other in self.jobs if other.state is not State.WAITING]
        assert together(self.scheduler.limits, started), "by hope"
        found = self.found(job)
        assert pinned(job) or job.held >= size(self.scheduler.limits, job, found.done)
        self.starts.append(job)
        self.slices[job] -= found.done
        return found

    # what is there, counted from the jobs alone

    def used(self) -> int:
        return sum(job.held for job in self.jobs)

    def _look(self, plan: Plan, before: list[Job]) -> None:
        has = self.scheduler.limits
        assert set(plan.decode) == set(before) - set(plan.out), "a decode was skipped, or invented"
        assert not (plan.out and plan.back)
        granted = dict(plan.prompt)
        assert len(granted) == len(plan.prompt)
        assert not {*granted, *plan.decode, *plan.back} & {*plan.out}
        assert plan.tokens == len(plan.decode) + sum(granted.values()) <= has.step_tokens
        for job, count in plan.prompt:
            assert job.state is State.PROMPT
            assert job.ready
            assert 1 <= count <= (job.prompt if job.whole else job.prompt - job.done)
        self._look_at_bytes(granted)
        if plan.tokens < has.step_tokens:
            self._look_at_what_is_left(plan, granted)

    def _look_at_bytes(self, granted: dict[Job, int]) -> None:
        """While the step is computed, all that is on the device has room there."""
        has, total = self.scheduler.limits, 0
        for job in self.jobs:
            if job.state in (State.PROMPT, State.DECODE, State.COMING):
                tokens = job.done + granted.get(job, 0)
                if job.made:
                    tokens = min(job.prompt + job.made, job.capacity)
                total += worst(job) if pinned(job) else size(has, job, tokens)
                assert job.need.movable or job.state is not State.COMING
        assert total == self.scheduler.device_used <= has.device_bytes
        out = [job for job in self.jobs if job.state in (State.OUT, State.COMING)]
        assert sum(below(job) for job in out) == self.scheduler.lower_used <= has.lower_bytes
        started = [job for job in self.jobs if job.state is not State.WAITING]
        pool = sum(job.need.pool * job.capacity for job in started)
        assert pool == self.scheduler.pool_used <= has.pool_bytes

    def _look_at_what_is_left(self, plan: Plan, granted: dict[Job, int]) -> None:
        """The step has tokens left: nobody who may run could have used them."""
        has, free = self.scheduler.limits, self.scheduler.limits.device_bytes - self.used()
        short = False
        for job in self.jobs:
            more = job.prompt - job.done - granted.get(job, 0)
            if job.state is State.PROMPT and job.ready and more > 0:
                needs = size(has, job, job.done + granted.get(job, 0) + 1) - job.held
                assert not pinned(job), "its memory is its own"
                assert needs > free, "a prompt could have been read further"
                short = True
        line = [job for job in self.jobs if job.state in (State.WAITING, State.OUT)]
        if not line or short or plan.out:
            return
        head = min(line, key=self.scheduler.policy.rank)
        running = [job for job in self.jobs if job.state not in (State.WAITING, State.OUT)]
        if len(running) == has.max_running:
            return
        room = free - sum(place(has, job) - job.held for job in running) >= place(has, head)
        started = [job for job in self.jobs if job.state is not State.WAITING]
        fits = head.state is State.OUT or together(has, [*started, head])
        assert not (room and fits), "somebody could have started"


def pinned(job):
    return not job.need.movable or (job.whole and job.made == 0)


def rate(job):
    return job.need.answer if job.made else max(job.need.prompt, job.need.answer)


def worst(job):
    if not pinned(job):
        return rate(job) * job.capacity + job.need.fixed
    prompt = 0 if job.made else job.need.prompt * job.capacity
    return max(prompt, job.need.answer * job.capacity) + job.need.fixed


def size(has, job, tokens):
    if has.granule is None:
        return rate(job) * job.capacity + job.need.fixed
    while tokens % has.granule:
        tokens += 1
    return rate(job) * min(tokens, job.capacity) + job.need.fixed


def place(has, job):
    """Bytes with which a job may start or come back."""
    if pinned(job):
        return worst(job)
    there = job.prompt + min(job.made, job.limit - 1)
    return size(has, job, there + (has.granule or 0))


def below(job):
    need = job.need
    return max(need.prompt, need.answer) * job.capacity + need.slack if need.movable else 0


def together(has, jobs):
    """Whether these may all be started: see `engine.service.room`."""
    kept = sum(worst(job) for job in jobs if pinned(job))
    moving = [worst(job) for job in jobs if not pinned(job)]
    if sum(job.need.pool * job.capacity for job in jobs) > has.pool_bytes:
        return False
    homes = sum(below(job) for job in jobs) <= has.lower_bytes
    return kept + sum(moving) <= has.device_bytes or (
        homes and kept + max([0, *moving]) <= has.device_bytes
    )


def scheduled(policy: Policy, **more) -> Caller:
    """A caller of a scheduler with small limits."""
    own = {name: more.pop(name) for name in ("found", "at_once") if name in more}
    return Caller(Scheduler(limits(**more), policy), **own)
