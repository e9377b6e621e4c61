"""What is seen a second time comes to a full disk; while there is room, all comes."""

from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.admission import SecondSight
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.quotas import Quotas
from kvstore.store import TieredStore
from kvstore.tier import HostTier, Resident
from tests.kvstore.make import chain, content, identity, items

ONE = chain(range(12))
TWO = chain(range(100, 112))
SINGLES = [chain([i] * 4)[0] for i in range(8)]
COST = entry_cost(content(ONE[0], identity()))
NBYTES = items(ONE[:1])[0][1].nbytes


@pytest.fixture
def disk(tmp_path):
    return DiskTier(tmp_path / "store", 4 * COST)


def put(store, keys):
    store.put(items(keys))
    store.flush()


def test_under_pressure_a_block_comes_to_the_disk_the_second_time(disk):
    with TieredStore([disk], admission="second-sight") as store:
        put(store, ONE)
        put(store, TWO)
        assert disk.held([*ONE, *TWO]) == [True] * 4 + [False] * 2
        assert store.stats().tiers["disk"].refused == 2
        assert store.stats().tiers["disk"].skipped == 0
        put(store, TWO)
        assert disk.held(TWO) == [True] * 3
        assert store.stats().tiers["disk"].evictions == 2
        assert store.audit().clean


def test_to_memory_all_comes(disk):
    host = HostTier(2 * NBYTES)
    with TieredStore([host, disk], admission="second-sight") as store:
        for key in SINGLES:
            put(store, [key])
        assert host.held(SINGLES) == [False] * 6 + [True] * 2
        assert disk.held(SINGLES) == [True] * 4 + [False] * 4


def test_a_child_does_not_come_without_its_parent(disk):
    with TieredStore([disk], admission="second-sight") as store:
        put(store, SINGLES[:4])
        put(store, ONE[1:])
        put(store, ONE[1:])  # seen twice, and its parent never
        assert disk.held(ONE) == [False] * 3
        put(store, ONE)
        assert disk.held(ONE) == [False] * 3
        put(store, ONE)
        assert disk.held(ONE) == [True] * 3


def test_what_went_was_seen(disk):
    with TieredStore([disk], admission="second-sight") as store:
        put(store, SINGLES[:4])
        put(store, SINGLES[4:5])
        put(store, SINGLES[4:5])
        assert disk.held(SINGLES[:5]) == [False] + [True] * 4
        put(store, SINGLES[:1])
        assert disk.held(SINGLES[:1]) == [True]


def test_a_block_of_memory_that_is_used_again_comes_to_the_disk(disk):
    with TieredStore([HostTier(8 * NBYTES), disk], admission="second-sight") as store:
        put(store, SINGLES[:4])
        put(store, ONE)
        assert disk.held(ONE) == [False] * 3
        store.promote(ONE[: store.lookup(ONE)])
        store.flush()
        assert disk.held(ONE) == [True] * 3


def test_a_tenant_at_its_quota_is_under_pressure_alone(tmp_path):
    other = chain(range(8), tenant=b"other")
    quotas = Quotas(own={ONE[0].tenant: 2 * COST}, whole=9 * COST)
    with closing(DiskTier(tmp_path / "store", 9 * COST)) as disk:
        store = TieredStore([disk], admission="second-sight", quotas=quotas)
        put(store, SINGLES[:3])
        put(store, other)
        assert disk.held([*SINGLES[:3], *other]) == [True, True, False, True, True]
        put(store, SINGLES[2:3])
        assert disk.held(SINGLES[:3]) == [False, True, True]
        store.close()


def nowhere(digest):
    return False


def offers(names, nbytes=1):
    return [Resident(name, None, nbytes, 0, b"") for name in names]


def test_names_are_remembered_for_as_many_bytes_as_the_tier_has():
    seen = SecondSight(3)
    assert not any(seen.choose(offers([b"a", b"b", b"c", b"d"]), 0, {}, nowhere))
    assert seen.choose(offers([b"a", b"d", b"b", b"c"]), 0, {}, nowhere) == [
        False,
        True,
        False,
        True,
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_a_block_without_room_comes_if_and_only_if_it_is_among_the_last_seen(offered):
    seen, last = SecondSight(3), []
    for name, free in offered:
        (comes,) = seen.choose(offers([bytes([name])]), free, {}, nowhere)
        assert comes == (free > 0 or name in last)
        last = [x for x in last if x != name]
        last = last if comes else [*last, name][-3:]


def test_a_prompt_that_comes_block_by_block_was_not_seen_before_its_end(disk):
    host = HostTier(16 * NBYTES)
    with TieredStore([host, disk], admission="second-sight") as store:
        put(store, SINGLES[:4])
        for key in ONE:  # each rests on those before it, which come along once more
            put(store, [key])
        assert disk.held([*ONE, *SINGLES[:4]]) == [False] * 3 + [True] * 4
        assert store.stats().tiers["disk"].evictions == 0
        store.promote(ONE)  # used again
        store.flush()
        assert disk.held(ONE) == [True] * 3


def test_what_was_seen_brings_what_it_rests_on():
    chooser = SecondSight(10)
    first, second = (
        Resident(bytes([i]), bytes([i - 1]) if i > 1 else None, 1, i, b"") for i in (1, 2)
    )
    assert chooser.choose([first, second], 0, {}, lambda _: False) == [False, False]
    below = {first.digest}
    third = Resident(b"3", second.digest, 1, 3, b"")
    assert chooser.choose([first, third], 0, {}, lambda _: False, below) == [False, False]
    assert chooser.choose([first, second], 0, {}, lambda _: False, below) == [True, True]
