"""A tier under its policy: what is found while it is pinned stays, and what has to go, goes."""

import threading
from collections import Counter
from contextlib import closing

import pytest

from kvstore.config import StoreConfig
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.eviction import POLICIES
from kvstore.level import Level
from kvstore.ranks import ALL
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items


class Halting(HostTier):
    """Stops before it evicts until somebody asks what it holds, whom it then overtakes."""

    def __init__(self, capacity_bytes):
        super().__init__(capacity_bytes)
        self.evicting, self.asked, self.done = (threading.Event() for _ in range(3))
        self.asker = threading.current_thread()

    def put(self, blocks, victims=(), limits=None):
        if victims:
            self.evicting.set()
            assert self.asked.wait(10)
        return super().put(blocks, victims, limits)

    def held(self, keys):
        found = super().held(keys)
        if self.evicting.is_set() and threading.current_thread() is self.asker:
            self.asked.set()
            assert self.done.wait(10)
        return found


def test_a_block_that_is_being_evicted_is_not_found_by_who_pins_it_too_late():
    old, new = chain(range(4)), chain(range(100, 104))
    tier, pins = Halting(items(old)[0][1].nbytes), Counter()
    level = Level(tier, threading.RLock(), pins)
    assert level.insert(items(old)) == 1

    def insert():
        level.insert(items(new))
        tier.done.set()

    inserting = threading.Thread(target=insert)
    inserting.start()
    assert tier.evicting.wait(10)
    pins[old[0].digest] += 1
    found = level.held(old)
    inserting.join()
    assert found == [tier.get(old[0]) is not None] == [False]


SINGLES = [chain(range(10 * i, 10 * i + 4)) for i in range(5)]
COST = entry_cost(content(SINGLES[0][0], identity()))


def level_of(tier, policy, blocks=()):
    level = Level(tier, threading.RLock(), Counter(), policy)
    for keys in blocks:
        level.insert(items(keys))
    return level


def test_a_deletion_takes_nothing_from_what_the_policy_knows_of_the_others():
    level = level_of(HostTier(4 * items(SINGLES[0])[0][1].nbytes), "lru", SINGLES[:4])
    level.touch(SINGLES[0])
    level.delete([key.digest for key in SINGLES[3]])
    for keys in (SINGLES[3], SINGLES[4]):
        level.insert(items(keys))
    assert level.held([keys[0] for keys in SINGLES]) == [True, False, True, True, True]


@pytest.mark.parametrize(("policy", "gone"), [("lru", 2), ("lfu", 3)])
def test_what_another_process_stored_and_evicted_is_learnt(policy, gone, tmp_path):
    tier = DiskTier(tmp_path / "store", 3 * COST)
    level = level_of(tier, policy, SINGLES[:2])
    tier.put(items(SINGLES[2]))  # as if by another process
    tier.delete(SINGLES[1])
    tier.access._seen = 0  # nor was it us
    level.insert(items(SINGLES[3]))
    level.touch(SINGLES[0])
    level.insert(items(SINGLES[4]))  # there is no 1 that could go for it
    tier.close()
    with closing(DiskTier(tmp_path / "store", 3 * COST)) as tier:
        left = tier.held([keys[0] for keys in SINGLES])
    # what is new to LFU counts as used now; LRU knows from the disk that 2 came before 3
    assert left == [i not in (1, gone) for i in range(5)]


def test_room_costs_no_more_victims_than_it_takes():
    nbytes = items(SINGLES[0])[0][1].nbytes
    level = level_of(HostTier(2 * nbytes), "sieve", SINGLES[:2])
    level.touch(SINGLES[1])
    level.insert(items(SINGLES[2]))  # in the place of 0: the hand has not come to 1
    level.insert(items(SINGLES[3]))  # it has now, and goes on to 2
    assert level.held([keys[0] for keys in SINGLES[:4]]) == [False, True, False, True]


def blocks_of(level):
    return level._ranks._policies[ALL]._blocks


@pytest.mark.parametrize("policy", POLICIES)
def test_all_tiers_follow_the_policy_that_is_set(policy, tmp_path):
    config = StoreConfig(host_bytes=1 << 20, disk_path=str(tmp_path / "store"), policy=policy)
    with TieredStore.open(config) as store:
        made = [level._ranks.make for level in store._levels]
    assert made == [POLICIES[policy]] * 2


def test_tiers_say_how_deep_in_their_chains_blocks_are(tmp_path):
    keys = chain(range(12))
    with closing(DiskTier(tmp_path / "store", 3 * COST)) as disk:
        for tier in (disk, HostTier(1 << 20)):
            level = level_of(tier, "gdsf", [keys])
            found = {resident.digest: resident.depth for resident in tier.residents()}
            assert found == {key.digest: key.depth for key in keys}
            assert blocks_of(level) == blocks_of(level_of(tier, "gdsf"))


def test_a_batch_goes_in_at_once_where_another_process_had_evicted_what_was_to_go(tmp_path):
    old, theirs, new = (items(chain(range(n, n + 32))) for n in (0, 1000, 2000))
    cost = entry_cost(old[0][1].data)
    with closing(DiskTier(tmp_path, 8 * cost)) as tier:
        level = Level(tier, threading.RLock(), Counter())
        assert level.insert(old) == 8
        tier.delete([key for key, _ in old])  # as another process does that evicts
        tier.put(theirs)
        tier.access._seen = 0  # nor was it us
        tier.access.mend = None  # nothing is damaged, and to look for that takes long
        batches = []
        put = tier.put
        tier.put = lambda blocks, *rest: batches.append(len(blocks)) or put(blocks, *rest)
        assert level.insert(new) == 8
        assert batches == [8, 8]


def test_what_a_full_tier_holds_is_not_read_anew_where_nobody_else_changed_it(tmp_path):
    held, new = (items(chain(range(n, n + 32))) for n in (0, 1000))
    with closing(DiskTier(tmp_path, 8 * entry_cost(held[0][1].data))) as tier:
        level = Level(tier, threading.RLock(), {key.digest for key, _ in held})
        assert level.insert(held) == 8
        asked, residents = [], tier.residents
        tier.residents = lambda: asked.append(tier) or residents()
        assert level.insert(new) == level.insert(new) == 0
        assert (level.stats.skipped, asked) == (16, [])
        tier.access.quarantine(held[7][0].digest, "for a test")
        assert level.insert(new) == 1
        assert asked == [tier]


def test_a_quota_that_is_set_later_leaves_the_order_of_use():
    first, *others = singles = [chain(range(n, n + 4)) for n in range(0, 32, 4)]
    with TieredStore([HostTier(8 * items(first)[0][1].nbytes)]) as store:
        for keys in singles:
            store.put(items(keys))
        assert store.lookup(first) == 1
        store.limit(b"somebody", 1 << 20)
        store.put(items(chain(range(100, 104))))
        assert store.lookup(first) == 1
        assert [store.lookup(keys) for keys in others] == [0, *[1] * 6]


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_a_damaged_entry_keeps_nothing_out_of_a_full_tier(tmp_path, policy, read):
    two, others = chain(range(8)), [chain([1000 + i] * 4)[0] for i in range(6)]
    cost = entry_cost(content(two[0], identity()))
    tier = DiskTier(tmp_path / "store", 8 * cost)
    with TieredStore([tier], policy=policy) as store:
        store.put(items(two))
        store.put(items(others))
        store.flush()
        with tier.access.ledger.env.lmdb.begin(write=True) as txn:
            stored = bytearray(txn.get(two[1].digest, db=tier.access.ledger.env.entries))
            stored[40] ^= 1
            txn.put(two[1].digest, bytes(stored), db=tier.access.ledger.env.entries)
        assert not read or store.get(two[1]) is None
        new = [chain([5000 + i] * 4)[0] for i in range(20)]
        for key in new:
            store.put(items([key]))
            store.flush()
        numbers = store.stats().tiers["disk"]
        assert (numbers.skipped, sum(tier.held(new))) == (0, 8)
        assert store.audit().clean


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_that_another_process_deletes_behind_its_commit_leaves_no_trace(policy, tmp_path):
    with closing(DiskTier(tmp_path / "store", 3 * COST)) as tier:
        level = level_of(tier, policy, SINGLES[:1])
        sizes = tier.sizes

        def late(digests):
            tier.delete(digests)
            return sizes(digests)

        tier.sizes = late
        level.insert(items(SINGLES[1]))
        tier.sizes = sizes
        assert SINGLES[1][0].digest not in level._ranks
        for keys in SINGLES[1:]:  # there is room for three of five
            assert level.insert(items(keys)) == 1
