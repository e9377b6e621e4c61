"""Pins: blocks stay while one holds, and one that nobody releases ends by itself."""

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.pins import PIN_S, Pins
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, items

SINGLES = [chain(range(10 * i, 10 * i + 4)) for i in range(4)]
NBYTES = items(SINGLES[0])[0][1].nbytes


class Clock:
    """Seconds, as somebody sets them."""

    def __init__(self):
        self.s = 1000.0

    def __call__(self):
        return self.s


def test_a_leaked_pin_does_not_wedge_the_store(caplog):
    clock = Clock()
    with TieredStore([HostTier(2 * NBYTES)]) as store:
        store._pins._clock = clock
        store._pins._last = clock()
        for keys in SINGLES[:2]:
            store.put(items(keys))
            store.pin(keys)  # and forgotten
        store.put(items(SINGLES[2]))
        assert store.stats().tiers["host"].skipped == 1
        clock.s += PIN_S - 1
        assert (store.stats().pinned, store.stats().oldest_pin_s) == (2, PIN_S - 1)
        clock.s += 2
        store.put(items(SINGLES[2]))
        assert store.lookup(SINGLES[2]) == 1
        stats = store.stats()
        assert (stats.pinned, stats.oldest_pin_s, stats.expired_pins) == (0, 0, 2)
    assert caplog.text.count("was not released in time") == 2


def test_a_pin_ends_with_its_with_and_again_changes_nothing():
    pins = Pins(threading.RLock())
    with pins.pin([b"a", b"b"], 9) as pin, pins.pin([b"b"], 9):
        pin.release()
        pin.release()
        assert b"a" not in pins
        assert b"b" in pins
    assert not len(pins)
    assert pins.expired == 0


@pytest.mark.parametrize("ttl_s", [0, -1, float("inf"), float("nan")])
def test_a_pin_needs_an_end(ttl_s):
    with pytest.raises(ValueError, match="ttl_s must be"):
        Pins(threading.RLock()).pin([b"a"], ttl_s)


def test_a_clock_that_jumps_ends_pins_early_or_keeps_them_as_long_as_was_asked():
    clock = Clock()
    pins = Pins(threading.RLock(), clock)
    pins.pin([b"a"], 10)
    clock.s -= 1e9
    assert b"a" in pins
    assert pins.oldest_s == 0
    clock.s += 9
    assert b"a" in pins
    clock.s += 1
    assert b"a" not in pins
    pins.pin([b"b"], 10)
    clock.s += 1e9
    assert b"b" not in pins
    assert pins.expired == 2


def test_released_pins_leave_nothing_behind():
    pins = Pins(threading.RLock())
    for _ in range(1000):
        pins.pin([b"a"], 100).release()
    assert len(pins._ends) <= 64


class PinMachine(RuleBasedStateMachine):
    """Against a list of what is pinned until when."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.pins = Pins(threading.RLock(), self.clock)
        self.made = []  # handle, names, end, since
        self.ended = 0

    @rule(names=st.lists(st.sampled_from("abcd"), max_size=4), ttl=st.integers(1, 9))
    def pin(self, names, ttl):
        names = [name.encode() for name in names]
        end = self.clock.s + ttl
        self.made.append((self.pins.pin(names, ttl), names, end, self.clock.s))

    @precondition(lambda self: self.made)
    @rule(at=st.integers(0, 100))
    def release(self, at):
        self.made.pop(at % len(self.made))[0].release()

    @rule(by=st.integers(1, 5))
    def wait(self, by):
        self.clock.s += by
        self.ended += sum(end <= self.clock.s for _, _, end, _ in self.made)
        self.made = [pin for pin in self.made if pin[2] > self.clock.s]

    @invariant()
    def agree(self):
        wanted = {name for _, names, _, _ in self.made for name in names}
        assert {name for name in (b"a", b"b", b"c", b"d") if name in self.pins} == wanted
        assert len(self.pins) == len(wanted)
        assert self.pins.expired == self.ended
        oldest = min((since for *_, since in self.made), default=self.clock.s)
        assert self.pins.oldest_s == self.clock.s - oldest


TestPinsAgainstAList = PinMachine.TestCase
TestPinsAgainstAList.settings = settings(max_examples=60, stateful_step_count=30)
