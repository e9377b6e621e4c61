"""Every policy against its definition, and what all of them promise."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction import POLICIES
from kvstore.policies.gdsf import GDSF
from tests.kvstore.policies import models

COUNT = 15
NAMES = [bytes([i]) for i in range(COUNT)]
PARENTS = {name: NAMES[i // 2 - 1] if i > 1 else None for i, name in enumerate(NAMES)}
SIZES = {name: 1 + i % 3 for i, name in enumerate(NAMES)}
MODELS = {
    "lru": models.LRU, "fifo": models.FIFO, "lfu": models.LFU, "arc": models.ARC,
    "s3fifo": models.S3FIFO, "sieve": models.SIEVE, "gdsf": models.GDSF,
}  # fmt: skip


def make(name):
    return GDSF(depth=models.GDSF.depth) if name == "gdsf" else POLICIES[name]()


NAME = st.sampled_from(NAMES)
FEW = st.lists(NAME, unique=True, max_size=4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), NAME),
        st.tuples(st.just("chain"), NAME),
        st.tuples(st.just("touch"), FEW),
        st.tuples(st.just("remove"), NAME),
        st.tuples(st.just("evict"), st.tuples(st.integers(0, 6), FEW, st.booleans())),
    ),
    max_size=40,
)


def chain_to(name):
    chain = []
    while name is not None:
        chain.append(name)
        name = PARENTS[name]
    return chain[::-1]


def follow(policy, model, step, arg):
    """The same to both."""
    if step == "add":
        policy.add(arg, PARENTS[arg], SIZES[arg], len(chain_to(arg)) - 1)
        model.add(arg)
    elif step == "chain":
        for name in chain_to(arg):
            if name in policy:
                continue
            follow(policy, model, "add", name)
        follow(policy, model, "touch", chain_to(arg))
    elif step == "touch":
        policy.touch(arg)
        model.touch(arg)
    elif step == "remove":
        policy.remove(arg)
        model.remove(arg)
    else:
        count, pinned, goes = arg
        found = list(islice(policy.victims(pinned), count))
        assert found == list(islice(model.victims(pinned), count))
        for name in found if goes else ():
            follow(policy, model, "remove", name)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=400)
@given(steps=STEPS, pinned=st.sets(NAME, max_size=3))
def test_victims_are_those_of_the_definition(name, steps, pinned):
    policy, model = make(name), MODELS[name](PARENTS, SIZES)
    for step in steps:
        follow(policy, model, *step)
        assert set(policy) == set(model.times)
    assert list(policy.victims(pinned)) == list(model.victims(pinned))
    assert len(policy) == len(model.times)


def needed(policy, pinned, excess):
    """Victims that sum to the excess, or all there are."""
    found, victims = [], policy.victims(pinned)
    while excess > 0 and (victim := next(victims, None)) is not None:
        found.append(victim)
        excess -= policy.nbytes(victim)
    return found


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=100)
@given(requests=st.lists(st.tuples(NAME, FEW), max_size=30), room=st.integers(3, 20))
def test_what_stays_is_the_beginning_of_every_chain_and_what_is_pinned(name, requests, room):
    policy = make(name)
    for wanted, pinned in requests:
        there = {x for x in pinned if x in policy}
        policy.touch([x for x in chain_to(wanted) if x in policy])
        for block in chain_to(wanted):
            excess = sum(map(policy.nbytes, policy)) + SIZES[block] - room
            for victim in needed(policy, {*pinned, *chain_to(wanted)}, excess):
                policy.remove(victim)
                excess -= SIZES[victim]
            if excess <= 0 and (PARENTS[block] is None or PARENTS[block] in policy):
                policy.add(block, PARENTS[block], SIZES[block])
        assert there <= set(policy)
        assert {PARENTS[x] for x in policy} - {None} <= set(policy)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_remembered_of_blocks_that_went_is_bounded(name):
    policy = make(name)
    policy.add(b"first", None, 1)  # and first to go, so that nobody looks at what comes after it
    for i in range(1, 4000):
        policy.add(i.to_bytes(2, "big"), None, 1)
        policy.touch([i.to_bytes(2, "big")] * (i % 3))
        if i % 2 == 0:
            assert next(policy.victims(())) == b"first"
        policy.remove((i - 1).to_bytes(2, "big"))
    for i in range(5000, 6000):  # nothing has to go
        policy.add(i.to_bytes(2, "big"), None, 1)
        policy.remove(i.to_bytes(2, "big"))
    assert len(policy) == 2
    ghosts = getattr(policy, "_ghosts", ())
    remembered = sum(map(len, ghosts)) if isinstance(ghosts, tuple) else len(ghosts)
    assert remembered <= 4  # twice the room, less what is here
    queued = sum(map(len, policy._heaps)) + len(policy._queued) + len(policy._loose)
    assert queued + len(policy._aside) < 300
    kept = [x for x in vars(policy).values() if isinstance(x, dict | set | Counter)]
    assert max(map(len, kept)) <= 3


@pytest.mark.parametrize("name", POLICIES)
def test_a_victim_that_stayed_comes_again(name):
    policy = make(name)
    for block in NAMES[:4]:
        policy.add(block, None, 1)
    (first,) = islice(policy.victims(()), 1)
    assert first in list(policy.victims(()))
