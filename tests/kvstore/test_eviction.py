"""The order in which blocks may go, against a slow but obvious definition."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction import FIFO, LRU

NAMES = [bytes([i]) for i in range(7)]
PARENT = {name: NAMES[i // 2 - 1] if i > 1 else None for i, name in enumerate(NAMES)}


def obvious(times, parents, pinned):
    """Remove the unpinned leaf of the least time until none is left."""
    left = dict(times)
    while leaves := [
        n for n in left if n not in pinned and n not in {parents[m] for m in left if m != n}
    ]:
        victim = min(leaves, key=left.get)
        del left[victim]
        yield victim


NAME = st.sampled_from(NAMES)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), NAME),
        st.tuples(st.just("touch"), st.lists(NAME, unique=True, max_size=4)),
        st.tuples(st.just("remove"), NAME),
    ),
    max_size=40,
)


@pytest.mark.parametrize("make", [LRU, FIFO])
@settings(max_examples=400)
@given(STEPS, st.sets(NAME, max_size=3))
def test_victims_are_the_leaves_used_or_added_longest_ago_one_after_the_other(make, steps, pinned):
    policy, times, now = make(), {}, 0
    for step, arg in steps:
        if step == "remove":
            policy.remove(arg)
            times.pop(arg, None)
            continue
        new = step == "add" and arg not in times
        if step == "add":
            policy.add(arg, PARENT[arg], 1)
            times.setdefault(arg, 0)
        else:
            policy.touch(arg)
        for name in [arg] if step == "add" else reversed(arg):
            if name in times and (new or make is LRU):
                now += 1
                times[name] = now
    assert list(policy.victims(pinned)) == list(obvious(times, PARENT, pinned))
    assert len(policy) == len(times)


def test_a_chain_goes_from_its_tail():
    lru = LRU()
    for name, parent in [(b"a", None), (b"b", b"a"), (b"c", b"b")]:
        lru.add(name, parent, 1)
    assert list(lru.victims(set())) == [b"c", b"b", b"a"]
    assert list(lru.victims({b"b"})) == [b"c"]
    lru.touch([b"b", b"a"])  # whatever was used last, leaves go first
    assert list(lru.victims(set())) == [b"c", b"b", b"a"]


def test_of_blocks_used_together_the_last_goes_first():
    lru = LRU()
    for name in (b"a", b"b", b"c"):
        lru.add(name, None, 1)
    lru.touch([b"a", b"b", b"c"])
    assert list(lru.victims(set())) == [b"c", b"b", b"a"]


def test_the_oldest_leaf_goes_first():
    lru = LRU()
    for name, parent in [(b"a", None), (b"b", b"a"), (b"c", b"b")]:
        lru.add(name, parent, 1)
    lru.add(b"x", None, 1)
    lru.touch([b"a", b"b", b"c"])
    assert list(islice(lru.victims(set()), 2)) == [b"x", b"c"]


def test_a_use_does_not_save_the_block_that_came_first():
    for make, last in ((LRU, b"a"), (FIFO, b"b")):
        policy = make()
        for name in (b"a", b"b"):
            policy.add(name, None, 1)
        policy.touch([b"a"])
        policy.add(b"a", None, 1)
        assert list(policy.victims(set()))[-1] == last


def test_the_first_chain_goes_first_and_from_its_tail():
    fifo = FIFO()
    for name, parent in [(b"a", None), (b"b", b"a"), (b"x", None), (b"c", b"b")]:
        fifo.add(name, parent, 1)
    assert list(fifo.victims(set())) == [b"x", b"c", b"b", b"a"]  # c is young, and b has to wait


def test_a_leaf_keeps_its_turn_when_a_block_built_on_it_goes_out_of_turn():
    fifo = FIFO()
    for name, parent in [(b"a", None), (b"b", None), (b"c", None), (b"d", b"b")]:
        fifo.add(name, parent, 1)
    fifo.remove(b"d")
    assert list(fifo.victims(set())) == [b"a", b"b", b"c"]
