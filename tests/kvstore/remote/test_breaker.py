"""When a server is asked, and when it is left alone."""

import logging
import threading

import pytest

from kvstore.errors import TimedOut, Unreachable
from kvstore.remote.breaker import FAILURES, Breaker


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def breaker(clock, chance=0.5):
    made = Breaker("here", 4.0, threading.Condition(), clock, lambda: chance)
    made.recovered()
    return made


def test_it_starts_open_with_a_probe_due(clock):
    made = Breaker("here", 4.0, threading.Condition(), clock)
    assert (made.is_open, made.due_in()) == (True, 0.0)
    made.recovered()
    assert (made.is_open, made.due_in(), made.openings) == (False, None, 0)


def test_failures_in_a_row_open_it_and_an_answer_ends_the_row(clock):
    made = breaker(clock)
    for _ in range(FAILURES - 1):
        made.failed(Unreachable("gone"))
    made.succeeded()
    for _ in range(FAILURES - 1):
        made.failed(Unreachable("gone"))
    assert not made.is_open
    made.failed(Unreachable("gone"))
    assert made.is_open
    assert (made.failures, made.time_outs, made.openings) == (2 * FAILURES - 1, 0, 1)


def test_one_time_out_opens_it(clock):
    made = breaker(clock)
    made.failed(TimedOut("slow"))
    assert (made.is_open, made.time_outs, made.openings) == (True, 1, 1)


@pytest.mark.parametrize(("chance", "pause"), [(0.0, 2.0), (0.5, 4.0), (1.0, 6.0)])
def test_the_pause_differs_by_chance_and_comes_again_after_each_probe(clock, chance, pause):
    made = breaker(clock, chance)
    made.failed(TimedOut("slow"))
    for _ in range(3):
        assert made.due_in() == pause
        clock.now += pause / 2
        assert made.due_in() == pause / 2
        clock.now += pause
        assert made.due_in() == 0.0
        made.failed(Unreachable("still gone"))
    assert made.openings == 1
    made.recovered()
    made.failed(TimedOut("slow"))
    assert made.openings == 2


def test_a_late_answer_does_not_close_it(clock):
    made = breaker(clock)
    made.failed(TimedOut("slow"))
    made.succeeded()
    assert made.is_open


def test_each_change_is_logged_once(clock, caplog):
    caplog.set_level(logging.INFO)
    made = breaker(clock)
    caplog.clear()
    for _ in range(10):
        made.failed(TimedOut("slow"))
    made.recovered()
    made.failed(TimedOut("slow"))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert "here is set aside" in caplog.messages[0]
    assert "slow" in caplog.messages[0]


def test_whoever_waits_for_it_is_woken(clock):
    changed = threading.Condition()
    made = Breaker("here", 4.0, changed, clock)
    woken = []

    def wait():
        with changed:
            woken.append(changed.wait_for(lambda: not made.is_open, 10))

    thread = threading.Thread(target=wait)
    thread.start()
    made.recovered()
    thread.join(10)
    assert woken == [True]
