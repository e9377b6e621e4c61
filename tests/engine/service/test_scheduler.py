"""Who runs in a step: decodes always, prompts as far as tokens go, nobody without memory."""

import pytest

from engine.errors import Busy, ConfigError, EngineError, PromptError
from engine.service.job import Job, Need, State
from engine.service.order import FCFS, Fair
from engine.service.plan import Plan, Started
from tests.engine.service.scheduling import DENSE, SPARSE, limits, scheduled

WHERE = [State.WAITING, State.PROMPT, State.DECODE, State.OUT, State.COMING]


def fcfs(**more):
    return scheduled(FCFS(), **more)


def at(state):
    """A caller whose one job is in this state."""
    caller = fcfs(at_once=False, lower_bytes=100)
    job = caller.add(5, 9)
    if state is not State.WAITING:
        caller.step()
    if state not in (State.WAITING, State.PROMPT):
        caller.scheduler.settled(job)
    if state in (State.OUT, State.COMING):
        caller.scheduler.force_out(job)
        caller.step()
    if state is State.COMING:
        caller.step()
    assert job.state is state
    return caller, job


# tokens


def test_decodes_come_first_then_unfinished_prompts_then_new_ones_and_fill_the_step():
    caller = fcfs()
    a, b, c = caller.add(4, 9), caller.add(13, 9), caller.add(30, 2)
    assert caller.step() == Plan(prompt=((a, 4), (b, 6)))
    assert caller.step() == Plan(decode=(a,), prompt=((b, 7), (c, 2)))
    assert caller.step() == Plan(decode=(a, b), prompt=((c, 8),))


def test_prompts_may_be_kept_small_beside_decodes_and_only_there():
    scheduler = fcfs().scheduler
    first, second = (Job(number, "", 6, 9, DENSE) for number in range(2))
    scheduler.add(first)
    plan = scheduler.next(lambda job: Started(0), beside=2)
    assert plan.prompt == ((first, 6),)
    scheduler.done(plan)
    scheduler.settled(first)
    scheduler.add(second)
    for beside, tokens in ((0, ()), (2, ((second, 2),)), (None, ((second, 6),))):
        plan = scheduler.next(lambda job: Started(0), beside)
        assert (plan.decode, plan.prompt) == ((first,), tokens)


def test_a_long_prompt_does_not_stop_those_who_decode():
    caller = fcfs(device_bytes=10_000)
    first, second = caller.add(3, 200), caller.add(2, 200)
    caller.step()
    long = caller.add(1000, 5)
    for _ in range(100):
        plan = caller.step()
        assert plan.decode == (first, second)
        assert plan.prompt == ((long, 8),)
    assert long.done == 800


def test_short_prompts_are_put_together_and_the_last_is_cut():
    caller = fcfs(max_running=9)
    jobs = [caller.add(length, 2) for length in (1, 2, 1, 3, 2, 5)]
    assert caller.step().prompt == (*((job, job.prompt) for job in jobs[:5]), (jobs[5], 1))


def test_no_more_run_at_a_time_than_may():
    caller = fcfs(max_running=2)
    jobs = [caller.add(1, 3) for _ in range(5)]
    assert len(caller.step().prompt) == 2
    assert caller.scheduler.running == 2
    caller.run()
    assert caller.starts == jobs


def test_a_prompt_found_in_the_store_is_computed_from_there_and_when_it_is_loaded():
    caller = fcfs(
        at_once=False, found=lambda job: Started(min(job.prompt - 1, 20), job.prompt < 25)
    )
    loads, there = caller.add(25, 2), caller.add(22, 2)
    assert caller.step().prompt == ((there, 2),)
    assert loads.held == 20
    caller.scheduler.settled(there)
    assert caller.step() == Plan(decode=(there,))
    caller.scheduler.ready(loads)
    assert caller.step().prompt == ((loads, 5),)


def test_a_complete_prompt_gets_no_tokens_before_it_is_settled():
    caller = fcfs(at_once=False)
    job = caller.add(5, 2)
    caller.step()
    caller.scheduler.ready(job)
    assert caller.step() == Plan(), "it has all it asked for"
    caller.scheduler.settled(job)
    assert caller.step().decode == (job,)


def test_a_whole_prompt_gets_tokens_until_it_is_settled():
    caller = fcfs(at_once=False)
    job = caller.add(12, 2, whole=True)
    granted = [caller.step().prompt for _ in range(4)]
    assert granted == [((job, 10),)] * 4
    caller.scheduler.settled(job)
    assert caller.step().decode == (job,)


def test_a_plan_that_was_not_carried_out_comes_again():
    caller = fcfs()
    caller.add(4, 3), caller.add(30, 1)
    caller.step()
    plans = [caller.scheduler.next(lambda job: Started(0)) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].tokens == 10
    caller.run()


def test_whoever_made_all_its_tokens_only_waits_to_be_ended():
    caller = fcfs()
    job = caller.add(2, 2)
    caller.step()
    caller.scheduler.done(caller.scheduler.next(lambda job: Started(0)))
    assert job.made == job.limit
    assert caller.scheduler.next(lambda job: Started(0)) == Plan()


# memory


def test_memory_grows_by_granules_up_to_what_the_job_can_need():
    caller = fcfs(granule=8)
    job = caller.add(7, 13)
    held = []
    while caller.jobs:
        caller.step()
        held.append(job.held)
    assert held == [8, 8] + [16] * 8 + [19] * 2 + [0]


def test_without_a_granule_a_job_has_all_of_its_memory_from_the_start():
    caller = fcfs(granule=None, device_bytes=30, lower_bytes=100)
    first, second = caller.add(5, 16), caller.add(5, 7)
    caller.step()
    assert first.held == 20
    assert second.state is State.WAITING
    caller.run()
    assert caller.scheduler.preemptions == 0


def test_a_start_has_room_for_the_whole_prompt_while_it_is_asked_what_is_stored():
    caller = fcfs(found=lambda job: Started(caller.scheduler.device_used - 1))
    caller.add(40, 2)
    assert caller.step().prompt[0][1] == 1


def test_a_request_that_cannot_run_alone_is_refused_with_what_it_needs():
    with pytest.raises(PromptError, match=r"up to 101 tokens needs 101 bytes.*cache_bytes is 100"):
        fcfs().add(50, 52)
    with pytest.raises(PromptError, match=r"10 bytes of KV in the pool, which has 9.*spill_bytes"):
        fcfs(pool_bytes=9).add(4, 2, SPARSE)
    with pytest.raises(PromptError, match="needs 125 bytes of KV on the device"):
        fcfs(pool_bytes=200).add(40, 1, SPARSE)


def test_more_than_may_wait_are_sent_away():
    caller = fcfs(max_waiting=2)
    caller.add(1, 1), caller.add(1, 1)
    with pytest.raises(Busy, match=r"2 requests wait already.*schedule.max_waiting"):
        caller.add(1, 1)
    caller.run()
    caller.add(1, 1)


def test_nobody_starts_in_the_hope_that_others_end_early():
    caller = fcfs(lower_bytes=100)
    first, second = caller.add(5, 56), caller.add(5, 56)
    caller.step()
    assert (first.state, second.state) == (State.DECODE, State.WAITING), "120 bytes have no home"


def test_what_has_a_home_below_starts_and_goes_there_when_memory_is_short():
    caller = fcfs(lower_bytes=120)
    first, second = caller.add(5, 56), caller.add(5, 56)
    plan = caller.until(lambda: caller.scheduler.preemptions)
    assert plan == Plan(out=(second,), decode=(first,)), "the last in order"
    assert caller.scheduler.lower_used == 60
    plan = caller.until(lambda: not caller.scheduler.out)
    assert plan == Plan(back=(second,))
    assert first.state is State.ENDED
    assert caller.step().decode == (second,)
    caller.run()
    assert caller.scheduler.preemptions == 1
    assert caller.scheduler.device_used == caller.scheduler.lower_used == 0


def test_the_last_in_order_goes_out_even_if_it_is_the_one_that_grows():
    caller = fcfs(device_bytes=96, granule=16, lower_bytes=200)
    first, second = caller.add(30, 60), caller.add(1, 50)
    plan = caller.until(lambda: caller.scheduler.preemptions)
    assert plan == Plan(out=(second,), decode=(first,))
    assert (first.held, second.made) == (64, 32), "the first needs no more yet"


def test_whoever_is_on_its_way_back_has_memory_and_no_tokens():
    caller, job = at(State.COMING)
    assert job.held == 6
    assert caller.scheduler.running == 1
    assert caller.step() == Plan()
    caller.scheduler.arrived(job)
    assert caller.step().decode == (job,)


def test_a_job_that_is_out_comes_back_before_new_ones_start():
    caller = fcfs(at_once=False, lower_bytes=300)
    job = caller.add(5, 5)
    caller.step()
    caller.scheduler.ready(job)
    caller.scheduler.settled(job)
    caller.scheduler.force_out(job)
    other = caller.add(3, 3)
    assert caller.step() == Plan(out=(job,)), "and not back, nor another in, in the same step"
    assert caller.step() == Plan(back=(job,), prompt=((other, 3),))


def test_forcing_out_has_no_effect_where_there_is_no_home():
    caller = fcfs()
    job = caller.add(5, 5)
    caller.step()
    caller.scheduler.force_out(job)
    assert caller.step().decode == (job,)


def test_sparse_jobs_keep_what_they_may_need_and_are_never_moved():
    caller = fcfs(at_once=False, pool_bytes=60, lower_bytes=500)
    first = caller.add(20, 5, SPARSE)
    second = caller.add(8, 5, SPARSE)
    caller.step()
    assert (first.held, caller.scheduler.pool_used) == (77, 48)
    assert second.state is State.WAITING, "the pool has room for one"
    caller.step()
    caller.scheduler.settled(first)
    assert first.held == 29, "of the answer"
    caller.scheduler.force_out(first)
    assert caller.step().decode == (first,)
    caller.finish(first)
    assert caller.step().prompt == ((second, 8),)


def test_a_whole_prompt_is_moved_only_after_it_is_settled():
    caller = fcfs(at_once=False, lower_bytes=100)
    job = caller.add(12, 5, whole=True)
    caller.step()
    caller.scheduler.force_out(job)
    assert job.held == 16, "all it may need"
    assert caller.step() == Plan(prompt=((job, 10),))
    caller.scheduler.settled(job)
    assert job.held == 12
    assert caller.step().out == (job,)


def test_a_job_that_may_not_start_yet_does_not_hold_up_those_that_must_end_first():
    caller = scheduled(Fair(1000), lower_bytes=120, granule=4, max_running=1)
    low = caller.add(40, 20)
    caller.step()
    caller.scheduler.force_out(low)
    high = caller.add(50, 50, priority=1)
    caller.step()
    assert low.state is State.OUT
    caller.run()
    assert caller.starts == [low, high]


def test_those_who_run_keep_room_to_grow_when_another_starts():
    caller = fcfs(lower_bytes=300, granule=10)
    first = caller.add(45, 30)
    for _ in range(5):
        caller.step()
    second = caller.add(40, 3)
    caller.step()
    assert first.held == 50
    assert second.state is State.WAITING, "42 bytes are not all that it would take: 10 to grow"
    caller.finish(first)
    assert caller.step().prompt == ((second, 10),)


def in_the_way(made, **more):
    """A prompt that begins to be read when one behind it has made so many tokens."""
    more |= dict(lower_bytes=300, at_once=False)
    caller = fcfs(found=lambda job: Started(0, ready=False), **more)
    prompt, behind = caller.add(60, 1), caller.add(1, 60)
    caller.step()
    caller.scheduler.ready(behind)
    caller.step()
    caller.scheduler.settled(behind)
    caller.until(lambda: behind.made == made)
    caller.scheduler.ready(prompt)
    return caller, prompt, behind


def test_a_prompt_takes_only_granules_that_are_free():
    caller, prompt, behind = in_the_way(41, granule=8)
    granted = [dict(caller.step().prompt)[prompt] for _ in range(6)]
    assert granted == [9] * 5 + [3]
    assert (prompt.held, behind.held) == (48, 48)


def test_a_prompt_takes_what_room_there_is_until_others_behind_it_make_more():
    caller, prompt, behind = in_the_way(45)
    for _ in range(5):
        assert caller.step() == Plan(decode=(behind,), prompt=((prompt, 9),))
    later = caller.add(1, 1)
    assert caller.step() == Plan(decode=(behind,), prompt=((prompt, 4),)), "100 bytes are in use"
    assert caller.step() == Plan(out=(behind,), prompt=((prompt, 10),))
    assert later.state is State.WAITING


def test_a_whole_prompt_and_what_must_be_able_to_grow_beside_it_fit_together():
    caller = fcfs(lower_bytes=300)
    caller.add(5, 56)
    caller.step()
    whole = caller.add(40, 21, whole=True)
    caller.step()
    assert whole.state is State.WAITING, "it would keep 60 bytes, the other may come to need 60"


# ends


@pytest.mark.parametrize("state", WHERE)
def test_a_job_can_end_in_any_state_and_leaves_nothing(state):
    caller, job = at(state)
    caller.scheduler.force_out(job)
    caller.scheduler.finish(job)
    caller.scheduler.finish(job)
    scheduler = caller.scheduler
    scheduler.check()
    assert job.state is State.ENDED
    assert scheduler.device_used == scheduler.lower_used == scheduler.running == scheduler.out == 0
    for late in (scheduler.ready, scheduler.arrived, scheduler.settled, scheduler.again):
        late(job)
    scheduler.done(Plan(decode=(job,), prompt=((job, 1),)))
    assert scheduler.next(lambda job: Started(0)) == Plan()


def test_a_job_may_end_while_it_is_started():
    caller = fcfs(found=lambda job: caller.finish(job) or Started(0, ready=False))
    caller.add(5, 5), caller.add(5, 5)
    assert caller.step() == Plan()
    assert len(caller.starts) == 2
    assert caller.scheduler.device_used == 0


def test_a_job_that_lost_what_it_loaded_is_started_again_before_later_ones():
    caller = fcfs(at_once=False, found=lambda job: Started(4, ready=False), max_running=1)
    job, later = caller.add(5, 5), caller.add(5, 5)
    caller.step()
    caller.scheduler.again(job)
    caller.scheduler.check()
    assert (job.state, job.done, job.held) == (State.WAITING, 0, 0)
    caller.step()
    assert caller.starts == [job, job]
    assert later.state is State.WAITING


# settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(max_running=11), "max_running is 11, step_tokens 10: every running request"),
        (dict(max_running=0), "max_running 0.* must be at least 1"),
        (dict(max_waiting=0), "max_waiting 0.* must be at least 1"),
        (dict(granule=0), "granule 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        limits(**setting)


def test_errors_of_the_service_are_for_users():
    assert issubclass(Busy, EngineError)


def test_needs_of_answers_may_be_less_than_those_of_prompts():
    caller = fcfs(lower_bytes=300)
    job = caller.add(8, 5, Need(4, 1))
    caller.step()
    assert job.held == 8, "32 before it was settled"
    assert caller.add(5, 5, DENSE).state is State.WAITING
    caller.run()
