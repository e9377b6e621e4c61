"""Replays: hits against slow but obvious definitions, and no policy above the optimum."""

from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.traces.read import read_traces, trace
from evals.traces.replay import named, optimum, replay, reuses
from kvstore.eviction import POLICIES
from kvstore.policies.lru import LRU
from tests.data import real_data


def chain_to(node):
    """From the root of a binary tree to a node, as ids."""
    chain = []
    while node:
        chain.append(node)
        node //= 2
    return chain[::-1]


def traces(nodes, requests):
    nodes = st.integers(1, nodes)
    return st.lists(nodes, min_size=1, max_size=requests).map(lambda x: [chain_to(n) for n in x])


def best(chains, capacity):
    """The most hits that there can be, by trying all that could be stored after each request."""

    @cache
    def most(number, stored):
        if number == len(chains):
            return 0
        chain = chains[number]
        hits = next((i for i, block in enumerate(chain) if block not in stored), len(chain))
        known = sorted({*stored, *chain})
        size = min(capacity, len(known))
        return hits + max(most(number + 1, frozenset(x)) for x in combinations(known, size))

    return most(0, frozenset())


def obvious(chains, capacity, policy):
    """Hits with stored blocks as a list, looked through from the head of each chain on."""
    stored, hits, clock = {}, [], 0
    for chain in chains:
        found = next((i for i, x in enumerate(chain) if x not in stored), len(chain))
        hits.append(found)
        if policy == "lru":
            for block in reversed(chain[:found]):
                stored[block] = clock = clock + 1
        for block in chain[found:]:
            parents = {x // 2 for x in stored}
            if len(stored) >= capacity:
                leaves = [x for x in stored if x not in parents and x not in chain]
                if not leaves:
                    break
                del stored[min(leaves, key=stored.get)]
            stored[block] = clock = clock + 1
    return hits


@given(traces(7, 6), st.integers(1, 4))
def test_beladys_rule_has_the_most_hits_that_there_can_be(chains, capacity):
    made = trace("x", chains)
    hits = optimum(reuses(made.chains, made.distinct), capacity)
    assert sum(hits) == best(tuple(map(tuple, chains)), capacity)


@given(traces(31, 40), st.integers(1, 20))
def test_no_policy_has_more_hits_than_beladys_rule(chains, capacity):
    made = trace("x", chains)
    limit = sum(optimum(reuses(made.chains, made.distinct), capacity))
    for policy in POLICIES.values():
        assert sum(replay(named(made.chains), policy(), capacity)) <= limit


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@given(chains=traces(31, 30), capacity=st.integers(1, 20))
def test_hits_are_those_of_the_obvious_cache(policy, chains, capacity):
    assert replay(named(trace("x", chains).chains), POLICIES[policy](), capacity) == obvious(
        chains, capacity, policy
    )


@given(traces(31, 30))
def test_with_room_for_all_every_policy_is_the_optimum(chains):
    made = trace("x", chains)
    hits = optimum(reuses(made.chains, made.distinct), made.distinct)
    seen, fresh = set(), []
    for chain in chains:
        fresh.append(sum(x in seen for x in chain))
        seen.update(chain)
    assert hits == fresh
    for policy in POLICIES.values():
        assert replay(named(made.chains), policy(), made.distinct) == hits


@given(traces(31, 30), st.integers(1, 20))
def test_a_policy_never_holds_more_than_there_is_room_for(chains, capacity):
    for make in POLICIES.values():
        policy = make()
        for chain in named(trace("x", chains).chains):
            replay([chain], policy, capacity)
            assert len(policy) <= capacity
            assert chain[0] in policy


def test_a_block_counts_only_behind_all_those_before_it():
    made = trace("x", [[1, 2, 3], [1, 4], [1, 2, 3]])
    assert replay(named(made.chains), LRU(), 3) == [0, 1, 2]  # 3 had to go for 4


def test_reuses_name_the_request_that_comes_next():
    made = trace("x", [[1, 2, 3], [1, 4], [1, 2]])
    assert reuses(made.chains, made.distinct) == [[(0, 1, 1), (1, 2, 2)], [(0, 1, 2)], []]


def test_beladys_rule_keeps_what_is_needed_sooner():
    made = trace("x", [[1], [2], [3], [1], [2]])
    assert optimum(reuses(made.chains, made.distinct), 1) == [0, 0, 0, 1, 0]
    assert replay(named(made.chains), LRU(), 1) == [0] * 5


def test_no_policy_beats_belady_on_recorded_requests():
    made = read_traces(real_data("traces/mooncake_conversation.jsonl"), 300)[0]
    reused = reuses(made.chains, made.distinct)
    for capacity in (300, 3000):
        limit = sum(optimum(reused, capacity))
        for policy in POLICIES.values():
            # the block that all share is a hit of all but the first request
            assert 299 <= sum(replay(named(made.chains), policy(), capacity)) <= limit
