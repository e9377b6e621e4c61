"""The order in which blocks may go, against a slow but obvious definition."""

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction import LRU

NAMES = [bytes([i]) for i in range(7)]
PARENT = {name: NAMES[i // 2 - 1] if i > 1 else None for i, name in enumerate(NAMES)}


def obvious(times, parents, pinned):
    """Remove the least recently used unpinned leaf until none is left."""
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


@settings(max_examples=400)
@given(STEPS, st.sets(NAME, max_size=3))
def test_victims_are_the_least_recently_used_leaves_one_after_the_other(steps, pinned):
    lru, times, now = LRU(), {}, 0
    for step, arg in steps:
        if step == "remove":
            lru.remove(arg)
            times.pop(arg, None)
            continue
        if step == "add":
            lru.add(arg, PARENT[arg], 1)
            times.setdefault(arg, 0)
        else:
            lru.touch(arg)
        for name in [arg] if step == "add" else reversed(arg):
            if name in times:
                now += 1
                times[name] = now
    assert list(lru.victims(pinned)) == list(obvious(times, PARENT, pinned))
    assert len(lru) == len(times)


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
