"""Prompts get what a step's bound leaves them."""

from math import inf

import pytest

from engine.errors import ConfigError
from engine.service.pace import LEAST, STALE, Pace
from engine.service.schedule import ScheduleConfig


class Machine:
    """Takes 10 ms for decodes, and so much more for a prompt token."""

    def __init__(self, pace, token_s, decode_s=0.01):
        self.pace, self.token_s, self.decode_s = pace, token_s, decode_s

    def step(self, decodes=4, most=512):
        beside = self.pace.allows()
        tokens = most if beside is None else min(most, beside)
        self.pace.learn(decodes, tokens, self.decode_s + self.token_s * tokens)
        return tokens


@pytest.mark.parametrize("token_s", [1e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("slowdown", [1.5, 2.0, 4.0])
def test_a_step_with_prompts_takes_as_much_longer_as_it_may(token_s, slowdown):
    machine = Machine(Pace(slowdown), token_s)
    for _ in range(100):
        tokens = machine.step()
    while not tokens:  # a step that looks what decodes alone take
        tokens = machine.step()
    wanted = max(LEAST, (slowdown - 1) * 0.01 / token_s)
    assert tokens == pytest.approx(min(512, wanted), rel=0.1)


def test_it_follows_what_steps_take():
    machine = Machine(Pace(2.0), 1e-4)
    for _ in range(60):
        machine.step()
    machine.decode_s, machine.token_s = 0.04, 2e-4  # more are answered, of longer texts
    steps = [machine.step() for _ in range(20 * STALE)]
    assert max(steps[-10:]) == pytest.approx(200, rel=0.15)


def test_it_looks_again_what_decodes_alone_take():
    machine = Machine(Pace(2.0), 1e-4)
    steps = [machine.step() for _ in range(4 * STALE)]
    assert 3 <= steps.count(0) <= 5
    assert steps[0] == 0


def test_one_long_pause_changes_little():
    machine, before = Machine(Pace(2.0), 1e-4), 0
    for _ in range(60):
        before = machine.step() or before
    machine.pace.learn(4, before, 5.0)
    after = machine.pace.allows() or machine.step() or machine.step()
    assert after > before / 2


def test_steps_without_decodes_teach_nothing_and_no_bound_is_none():
    pace = Pace(2.0)
    pace.learn(0, 512, 1.0)
    assert pace.allows() == 0
    assert Pace(inf).allows() is None
    with pytest.raises(ConfigError, match="slowdown"):
        ScheduleConfig(slowdown=1.0)


def test_what_pauses_answers_comes_again_when_they_had_their_share():
    pace = Pace(1.5)
    pace.learn(4, 0, 0.01)
    assert pace.may_pause()
    pace.paused(0.02)
    steps = 0
    while not pace.may_pause():
        pace.learn(4, 0, 0.01)
        steps += 1
    assert steps == 4, "0.02 s more in 0.04 s are one and a half times as long"
    pace.paused(0.02)
    pace.learn(0, 0, 0.001)
    assert pace.may_pause(), "nobody is answered"
    Pace(inf).paused(1.0)
