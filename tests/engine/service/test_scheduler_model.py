"""Under any order of arrivals, loads, moves and ends the books are exact, and everybody goes on."""

import random
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import Busy, PromptError
from engine.service.job import Need, State
from engine.service.order import FCFS, Fair
from engine.service.plan import Started
from tests.engine.service.scheduling import scheduled, together, worst

KINDS = [
    Need(1, 1),
    Need(2, 2),
    Need(2, 2, slack=7),
    Need(3, 1, pool=2, fixed=5, movable=False),
    Need(2, 0, pool=1, movable=False),
]
NEEDS = st.sampled_from(KINDS)
LIMITS = st.fixed_dictionaries(
    dict(
        step_tokens=st.integers(4, 12),
        max_running=st.integers(1, 4),
        max_waiting=st.integers(1, 8),
        device_bytes=st.integers(30, 160),
        lower_bytes=st.sampled_from([0, 60, 300]),
        pool_bytes=st.sampled_from([0, 100]),
        granule=st.sampled_from([None, 1, 4, 16]),
    )
)
JOB = st.tuples(st.integers(1, 40), st.integers(1, 16), NEEDS)
MORE = st.fixed_dictionaries(
    dict(tenant=st.sampled_from("abc"), priority=st.integers(-1, 2), whole=st.booleans())
)


def all_end(caller):
    """Nothing new comes: with steps, and what jobs wait for, all of them end."""
    idle, steps, work = 0, 0, sum(job.prompt + job.limit for job in caller.jobs)
    while caller.jobs:
        plan = caller.step()
        for job in caller.jobs:
            caller.help(job)
        idle = 0 if plan.tokens or plan.back else idle + 1
        steps += 1
        assert idle < 4, "nobody can go on"
        assert steps < 4 * work + 40, "it goes round in circles"
    scheduler = caller.scheduler
    assert scheduler.device_used == scheduler.lower_used == scheduler.pool_used == 0
    assert scheduler.running == scheduler.out == len(scheduler.waiting) == 0


class SchedulerMachine(RuleBasedStateMachine):
    """Everything that can happen to a scheduler, in any order; then what is left must end."""

    policy = FCFS

    @initialize(has=LIMITS)
    def begin(self, has):
        self.shares = []
        self.caller = scheduled(self.policy(), found=self._found, at_once=False, **has)
        self.scheduler = self.caller.scheduler

    def _found(self, job):
        share, ready = self.shares.pop() if self.shares else (0, True)
        return Started(min(job.prompt - 1, share), ready)

    @rule(job=JOB, more=MORE)
    def add(self, job, more):
        has, waiting = self.scheduler.limits, len(self.scheduler.waiting)
        try:
            self.caller.add(*job, **more)
        except PromptError:
            prompt, limit, need = job
            assert (
                max(need.prompt * prompt, need.answer * (prompt + limit - 1)) + need.fixed
                > has.device_bytes
                or max(need.prompt, need.answer) * (prompt + limit - 1) + need.fixed
                > has.device_bytes
                or need.pool * (prompt + limit - 1) > has.pool_bytes
            )
        except Busy:
            assert waiting >= has.max_waiting
        else:
            assert waiting < has.max_waiting
            assert worst(self.caller.jobs[-1]) <= has.device_bytes
            assert together(has, self.caller.jobs[-1:]), "it could never start"

    @rule(shares=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=4))
    def step(self, shares):
        self.shares = shares
        self.caller.step()

    @rule()
    def step_and_settle(self):
        self.caller.step()
        for job in self.caller.jobs:
            self.caller.help(job)

    @precondition(lambda self: self.caller.jobs)
    @rule(data=st.data())
    def help(self, data):
        self.caller.help(data.draw(st.sampled_from(self.caller.jobs)))

    @precondition(lambda self: self.caller.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = data.draw(st.sampled_from(self.caller.jobs))
        self.caller.finish(job)
        assert job.state is State.ENDED
        self.scheduler.finish(job)
        for late in (self.scheduler.ready, self.scheduler.arrived, self.scheduler.settled):
            late(job)
        assert job.state is State.ENDED

    @precondition(lambda self: self.caller.jobs)
    @rule(data=st.data())
    def force_out(self, data):
        self.scheduler.force_out(data.draw(st.sampled_from(self.caller.jobs)))

    @rule()
    def lose_what_is_loaded(self):
        for job in self.caller.jobs:
            if job.state is State.PROMPT and not job.ready:
                self.scheduler.again(job)
                self.caller.slices[job] = job.prompt

    @invariant()
    def books_are_exact(self):
        if hasattr(self, "caller"):
            self.scheduler.check()

    def teardown(self):
        if hasattr(self, "caller"):
            all_end(self.caller)


class FairMachine(SchedulerMachine):
    @staticmethod
    def policy():
        return Fair(aging_steps=3)


LONG = settings(max_examples=50, stateful_step_count=40, suppress_health_check=[*HealthCheck])
TestFirstComeFirstServed = SchedulerMachine.TestCase
TestFair = FairMachine.TestCase
TestFirstComeFirstServed.settings = TestFair.settings = LONG


def busy(seed):
    """A caller, and the jobs that come to it: long ones, with little memory."""
    draw = random.Random(seed)
    has = dict(
        step_tokens=draw.randint(4, 12),
        max_running=draw.randint(1, 4),
        max_waiting=draw.randint(1, 8),
        device_bytes=draw.randint(30, 160),
        lower_bytes=draw.choice([0, 60, 300, 300]),
        pool_bytes=draw.choice([0, 100]),
        granule=draw.choice([None, 1, 4, 16]),
    )
    policy = draw.choice([FCFS(), Fair(3), Fair(50)])
    caller = scheduled(policy, at_once=False, **has)
    caller.found = lambda job: Started(
        min(job.prompt - 1, draw.choice([0, 0, 5, 40])), draw.random() < 0.6
    )
    return caller, draw


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_under_load_somebody_always_goes_on_and_all_end(first):
    plans = []
    for seed in range(first, first + 20):
        caller, draw = busy(seed)
        for _ in range(60):
            if draw.random() < 0.4:
                with suppress(PromptError, Busy):
                    caller.add(
                        *(draw.randint(1, 40), draw.randint(1, 30), draw.choice(KINDS)),
                        whole=draw.random() < 0.2,
                        tenant=draw.choice("abc"),
                        priority=draw.randint(-1, 2),
                    )
            caller.step()
            for job in [*caller.jobs]:
                if draw.random() < 0.5:
                    caller.help(job)
                if draw.random() < 0.01:
                    caller.finish(job)
        all_end(caller)
        plans += caller.plans
    assert any(plan.out for plan in plans), "memory was never short"
    assert any(plan.back for plan in plans)


@settings(max_examples=40)
@given(has=LIMITS, jobs=st.lists(st.tuples(JOB, MORE, st.integers(0, 5)), max_size=25))
@pytest.mark.parametrize("policy", [FCFS, lambda: Fair(3)])
def test_the_same_requests_make_the_same_plans(policy, has, jobs):
    def plans():
        caller, seen = scheduled(policy(), **has), []
        for number, (job, more, steps) in enumerate(jobs):
            try:
                caller.add(*job, **more).id = number
            except (PromptError, Busy):
                continue
            seen += [named(caller.step()) for _ in range(steps)]
        return seen

    def named(plan):
        return [[job.id for job in jobs] for jobs in (plan.out, plan.back, plan.decode)] + [
            [(job.id, count) for job, count in plan.prompt]
        ]

    assert plans() == plans()


@settings(max_examples=60)
@given(has=LIMITS, jobs=st.lists(st.tuples(JOB, MORE, st.integers(0, 5)), max_size=25))
def test_first_come_first_served_starts_in_order_of_arrival(has, jobs):
    caller = scheduled(FCFS(), **has)
    for job, more, steps in jobs:
        try:
            caller.add(*job, **more)
        except (PromptError, Busy):
            continue
        for _ in range(steps):
            caller.step()
    caller.run()
    assert [job.arrival for job in caller.starts] == [*range(len(caller.starts))]
