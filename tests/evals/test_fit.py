"""The search for the size at which a prompt is full."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.fit import SLACK, DoesNotFit, fit


@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 20), st.integers(0, 5000))
def test_it_fits_and_one_more_would_not_or_almost_all_is_used(base, price, least, extra):
    room = base + price * least + extra

    def cost(size):
        return base + price * size

    size = fit(cost, room, least)
    assert size >= least
    assert cost(size) <= room
    assert cost(size + 1) > room or room - cost(size) <= SLACK * room


@given(
    st.lists(st.integers(0, 40), min_size=30, max_size=80),
    st.integers(0, 900),
    st.one_of(st.none(), st.integers(0, 79)),
)
def test_it_fits_whatever_the_sizes_cost(prices, room, guess):
    costs = [sum(prices[:i]) for i in range(len(prices))]
    size = fit(costs.__getitem__, room, 0, len(costs) - 1, guess)
    assert costs[size] <= room
    full = size == len(costs) - 1 or costs[size + 1] > room
    assert full or room - costs[size] <= SLACK * room


def test_a_few_tries_are_enough_where_the_cost_is_nearly_linear():
    for room in (500, 4_000, 131_072):
        tried = []

        def cost(size, tried=tried):
            tried.append(size)
            return 90 + int(1.37 * size) + size % 3

        fit(cost, room, 1)
        assert len(tried) <= 6
        tried.clear()
        fit(cost, room, 1, guess=int(room / 1.38))
        assert len(tried) <= 4


def test_sizes_at_which_nothing_is_added_grow_in_steps():
    """As documents of 90 units each do; the first guess has room for none."""
    tried = []

    def cost(size):
        tried.append(size)
        return 100 + 200 * (size // 90)

    size = fit(cost, 4000, 0)
    assert cost(size) <= 4000 < cost(size + 90)
    assert max(tried) < 10_000


def test_what_cannot_fit_says_how_much_it_takes():
    with pytest.raises(DoesNotFit, match="70 tokens") as caught:
        fit(lambda size: 10 * size, 69, 7)
    assert caught.value.tokens == 70


def test_it_ends_at_the_largest_size():
    assert fit(lambda size: size, 1000, 1, 40) == 40
    assert fit(lambda size: 5, 1000, 0, 0) == 0
