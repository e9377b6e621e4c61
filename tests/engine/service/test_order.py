"""Who comes first under each policy, how long anybody waits, and how far tenants drift apart."""

import random
from collections import Counter
from itertools import combinations

import pytest

from engine.errors import ConfigError
from engine.service.job import Job, State
from engine.service.order import FCFS, Fair
from engine.service.plan import Plan, Started
from tests.engine.service.scheduling import DENSE, SPARSE, scheduled


def fair(aging_steps=10_000, **more):
    return scheduled(Fair(aging_steps), **more)


def test_under_fcfs_nobody_overtakes_and_nobody_is_moved_for_who_waits():
    caller = scheduled(FCFS(), max_running=1, lower_bytes=100)
    first, second, third = (caller.add(3, 5, priority=p) for p in (0, 1, 9))
    caller.run()
    assert caller.starts == [first, second, third]
    assert caller.scheduler.preemptions == 0


def test_a_higher_priority_starts_first():
    caller = fair(max_running=1)
    low, high, middle = (caller.add(3, 5, priority=p) for p in (-1, 2, 0))
    caller.run()
    assert caller.starts == [high, middle, low]


def test_of_one_priority_the_tenant_that_had_least_starts_first():
    caller = fair(max_running=1)
    greedy = [caller.add(10, 5, tenant="greedy") for _ in range(4)]
    modest = [caller.add(2, 2, tenant="modest") for _ in range(4)]
    caller.run()
    assert caller.starts == [greedy[0], *modest[:4], *greedy[1:]]
    counters = caller.scheduler.policy.counters
    assert counters["greedy"] == 4 * (10 + 2 * 5)
    assert counters["modest"] == 4 * (2 + 2 * 2)


def test_what_the_store_had_of_a_prompt_costs_a_tenant_nothing():
    caller = fair(found=lambda job: Started(job.prompt - 1))
    caller.add(30, 1, tenant="a")
    caller.run()
    assert caller.scheduler.policy.counters["a"] == 1 + 2


def test_a_tenant_that_was_idle_has_saved_nothing_up():
    caller = fair(max_running=1, max_waiting=99)
    for _ in range(8):
        caller.add(10, 5, tenant="busy")
    for _ in range(30):
        caller.step()
    busy = caller.scheduler.policy.counters["busy"]
    back = caller.add(10, 5, tenant="back")
    assert caller.scheduler.policy.counters["back"] == busy
    caller.run()
    assert 2 < caller.starts.index(back) < 8


def test_a_tenant_whose_requests_were_cancelled_does_not_wait():
    caller = fair(max_running=1)
    gone = caller.add(10, 5, tenant="gone")
    for _ in range(4):
        caller.add(10, 5, tenant="busy", priority=1)
    caller.step()
    caller.finish(gone)
    for _ in range(10):
        caller.step()
    caller.add(10, 5, tenant="back")
    counters = caller.scheduler.policy.counters
    assert counters["back"] == counters["busy"] > counters["gone"]


def test_a_tenant_that_comes_to_an_empty_line_starts_from_who_left_it_last():
    caller = fair()
    caller.add(10, 5, tenant="first")
    caller.run()
    caller.add(1, 1, tenant="second")
    assert caller.scheduler.policy.counters["second"] == 20


def test_a_higher_priority_moves_a_running_job_down_and_it_comes_back():
    caller = fair(max_running=1, lower_bytes=200)
    low = caller.add(5, 30)
    for _ in range(4):
        caller.step()
    high = caller.add(4, 3, priority=1)
    plan = caller.step()
    assert (plan.out, plan.prompt) == ((low,), ((high, 4),))
    plan = caller.until(lambda: low.state is not State.OUT)
    assert high.state is State.ENDED
    assert plan.back == (low,)
    caller.run()
    assert caller.scheduler.preemptions == 1


@pytest.mark.parametrize(
    "kept",
    [
        dict(priority=1),  # no lower than who waits
        dict(need=SPARSE),  # cannot be moved
        dict(limit=96),  # would fit alone, but not below
    ],
)
def test_nobody_is_moved_who_is_not_lower_or_has_no_home(kept):
    caller = fair(max_running=1, lower_bytes=100, pool_bytes=900)
    running = caller.add(5, **dict(limit=12, need=DENSE) | kept)
    caller.step()
    caller.add(4, 3, priority=1)
    assert caller.step().decode == (running,)


def test_nobody_is_moved_if_that_is_not_enough():
    caller = fair(max_running=2, lower_bytes=200)
    low, same = caller.add(5, 20), caller.add(50, 20, priority=1)
    caller.until(lambda: low.state is same.state is State.DECODE)
    high = caller.add(60, 3, priority=1)
    assert caller.step().decode == (same, low)
    assert high.state is State.WAITING


def test_only_as_many_as_needed_are_moved_and_the_last_in_order_first():
    caller = fair(lower_bytes=400)
    low = [caller.add(5, 20, priority=p) for p in (-1, -3, -2)]
    same = caller.add(5, 20, priority=1)
    for _ in range(4):
        caller.step()
    high = caller.add(4, 3, priority=1)
    plan = caller.step()
    assert plan.out == (low[1],)
    assert set(plan.decode) == {low[0], low[2], same}
    assert plan.prompt == ((high, 4),)


def test_who_waited_long_enough_overtakes_a_higher_priority_and_is_not_moved_for_it():
    caller = fair(aging_steps=10, max_running=1, lower_bytes=200, max_waiting=99)
    low, number = caller.add(3, 30), 0
    while low.state is not State.ENDED:
        number += 1
        if len(caller.scheduler.waiting) < 5:
            caller.add(3, 5, priority=1)
        caller.step()
        assert number < 200, "it starved"
    assert caller.scheduler.preemptions == 0
    assert number > 20, "it was overtaken for two classes"


def test_waiting_moves_nobody_down():
    caller = fair(aging_steps=2, max_running=1, lower_bytes=200)
    running = caller.add(3, 40, priority=0)
    caller.step()
    aged = caller.add(3, 5, priority=-1)
    for _ in range(20):
        assert caller.step().decode == (running,)
    assert caller.scheduler.policy.class_of(aged) == 9
    caller.finish(aged)
    assert caller.scheduler.policy.class_of(aged) == -1, "it remembers nobody who is over"


def test_an_aging_of_no_steps_is_refused():
    with pytest.raises(ConfigError, match="aging_steps must be at least 1, got 0"):
        Fair(0)


@pytest.mark.parametrize("seed", range(12))
def test_nobody_is_overtaken_by_who_came_too_long_after_it(seed):
    """The bound that `Fair` states, with steps counted here."""
    draw, aging, highest = random.Random(seed), 5, 2
    caller = fair(aging, max_running=draw.randint(1, 3), lower_bytes=draw.choice([0, 300]))
    first_for, overtaken, plan = Counter[Job](), 0, Plan()
    for _ in range(150):
        while len(caller.scheduler.waiting) < 12:
            tenant, priority = draw.choice("abc"), draw.randint(0, highest)
            caller.add(draw.randint(1, 25), draw.randint(1, 12), tenant=tenant, priority=priority)
        first_for.update(firsts(caller.jobs, dict(plan.prompt)))
        before = len(caller.starts)
        plan = caller.step()
        for job in caller.starts[before:]:
            for other in caller.scheduler.waiting:
                bound = (highest - other.priority + 1) * aging
                assert first_for[job] > first_for[other] - bound
                overtaken += first_for[job] < first_for[other]
    assert overtaken, "with fewer steps than others some do start before them"
    assert any(job.priority == 0 for job in caller.starts)


def firsts(jobs, read):
    """Of those of a tenant and priority that got nothing in the last step, the first."""
    lines: dict[tuple, Job] = {}
    for job in jobs:  # in order of arrival
        if job.state in (State.WAITING, State.OUT) or (job.unread and job not in read):
            lines.setdefault((job.tenant, job.priority), job)
    return lines.values()


@pytest.mark.parametrize("seed", range(12))
def test_tenants_with_work_in_line_stay_within_the_bound_of_fairness(seed):
    draw = random.Random(seed)
    caller = fair(
        step_tokens=draw.choice([8, 40]),
        max_running=draw.randint(1, 8),
        device_bytes=draw.choice([100, 400]),
        lower_bytes=draw.choice([0, 300]),
        granule=draw.choice([1, 16, None]),
    )
    shapes = {tenant: (draw.randint(1, 50), draw.randint(1, 30)) for tenant in "abc"}
    scheduler, most, gap, seen = caller.scheduler, 0, 0, 0
    counters, largest = scheduler.policy.counters, [max(values) for values in zip(*shapes.values())]
    for _ in range(200):
        for tenant, (prompt, limit) in shapes.items():
            waiting = sum(job.tenant == tenant for job in scheduler.waiting)
            if waiting < 3 and draw.random() < 0.3:  # now and then, nobody waits
                caller.add(draw.randint(1, prompt), draw.randint(1, limit), tenant=tenant)
        caller.step()
        most = max([most, *(sum(j.tenant == t for j in scheduler.started) for t in shapes)])
        in_line = {job.tenant for job in scheduler.waiting}
        for one, other in combinations(sorted(in_line), 2):
            gap, seen = max(gap, abs(counters[one] - counters[other])), seen + 1
    assert seen > 50
    assert gap <= largest[0] + most * 2 * largest[1]
