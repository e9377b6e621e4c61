"""Allowances: exact to the second, with a clock that a test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.serve.limits import Bucket, Exceeded, Slots


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_what_is_in_it_and_fills_up_evenly():
    clock = Clock()
    bucket = Bucket("requests", 60, clock)
    for _ in range(60):
        bucket.take()
    with pytest.raises(Exceeded, match="60 requests per minute") as refused:
        bucket.take()
    assert refused.value.retry_s == pytest.approx(1)
    clock.now += 1
    bucket.take()
    with pytest.raises(Exceeded):
        bucket.take()
    clock.now += 3600  # it never holds more than a minute's
    for _ in range(60):
        bucket.take()
    with pytest.raises(Exceeded):
        bucket.take()


def test_more_than_a_full_bucket_is_given_and_owed():
    clock = Clock()
    bucket = Bucket("tokens", 100, clock)
    bucket.take(250)
    with pytest.raises(Exceeded) as refused:
        bucket.take(1)
    assert refused.value.retry_s == pytest.approx(151 * 60 / 100)
    clock.now += refused.value.retry_s
    bucket.take(1)


def test_what_was_used_is_owed_and_what_was_not_is_given_back():
    bucket = Bucket("tokens", 100, Clock())
    bucket.take(60)
    bucket.owe(70)
    with pytest.raises(Exceeded):
        bucket.take(1)
    bucket.owe(-60)
    bucket.take(30)
    with pytest.raises(Exceeded):
        bucket.take(1)


def test_without_a_limit_everything_is_given():
    bucket = Bucket("tokens", None, Clock())
    for _ in range(3):
        bucket.take(10**12)


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60),
    st.integers(50, 200),
)
def test_no_minute_gives_more_than_two_buckets(steps, limit):
    """One that was full at its start, and what came in during it."""
    clock = Clock()
    bucket, given_out = Bucket("tokens", limit, clock), []
    for pause, amount in steps:
        clock.now += pause
        try:
            bucket.take(amount)
        except Exceeded as refused:
            clock.now += refused.retry_s * (1 + 1e-9)
            bucket.take(amount)  # what is promised holds
        given_out.append((clock.now, amount))
    for start, _ in given_out:
        spent = sum(amount for at, amount in given_out if start <= at < start + 60)
        assert spent <= 2 * limit + 1e-6


def test_slots_are_given_back_whatever_happens():
    slots = Slots("this key has", 2)
    with slots.hold():
        with pytest.raises(ZeroDivisionError), slots.hold():
            raise ZeroDivisionError
        with slots.hold(), pytest.raises(Exceeded, match="this key has 2 at once"), slots.hold():
            pass
    assert slots.taken == 0
