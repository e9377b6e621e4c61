"""Quotas: no tenant above its own, none pushed below its share by another."""

import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import tenant_tag
from kvstore.config import StoreConfig
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.errors import TierFull
from kvstore.eviction import POLICIES
from kvstore.quotas import Quotas
from kvstore.store import TieredStore
from kvstore.tally import of_tenants
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items, right

MODEL = identity(num_layers=1, num_kv_heads=1, head_dim=4)
TENANTS = [b"a", b"b", b"c"]
TAGS = [tenant_tag(tenant) for tenant in TENANTS]
SINGLES = [[chain([i] * 4, model=MODEL, tenant=t)[0] for i in range(5)] for t in TENANTS]
CHAINS = [chain(range(24), model=MODEL, tenant=tenant) for tenant in TENANTS]
COST = entry_cost(content(CHAINS[0][0], MODEL))
NBYTES = items(CHAINS[0][:1], MODEL)[0][1].nbytes


def used(tier):
    return [of_tenants(tier.groups()).get(tag, 0) for tag in TAGS]


def store_of(disk, quotas, policy="lru"):
    return TieredStore([disk], quotas=quotas, policy=policy)


@pytest.fixture
def disk(tmp_path):
    return DiskTier(tmp_path / "store", 6 * COST)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tenant_at_its_quota_evicts_its_own_though_there_is_room(disk, policy):
    with store_of(disk, Quotas(2 * COST, whole=6 * COST), policy) as store:
        for keys in SINGLES[0][:4]:
            store.put(items([keys], MODEL))
            store.flush()
        assert used(disk) == [2 * COST, 0, 0]
        assert store.stats().tiers["disk"].evictions == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tenant_without_quota_gives_way_and_takes_nothing(disk, policy):
    with store_of(disk, Quotas(own={TAGS[1]: 4 * COST}, whole=6 * COST), policy) as store:
        for keys in (CHAINS[0][:6], CHAINS[1][:5], CHAINS[2][:6], CHAINS[0][:6]):
            store.put(items(keys, MODEL))
            store.flush()
            if keys[0].tenant != TAGS[1]:
                store.lookup(CHAINS[1])
        assert used(disk)[1] == 4 * COST
        assert disk.held(CHAINS[1][:4]) == [True] * 4
        assert store.audit().clean


def test_quotas_of_more_than_the_tier_are_shares_of_it(disk):
    with store_of(disk, Quotas(6 * COST, whole=6 * COST)) as store:
        for tenant, held in enumerate(([6, 0, 0], [3, 3, 0], [2, 2, 2])):
            store.put(items(CHAINS[tenant][:1], MODEL))
            store.flush()
            for key in (*SINGLES[tenant], *SINGLES[tenant]):
                store.put(items([key], MODEL))
                store.flush()
            assert used(disk) == [count * COST for count in held]


def test_in_a_smaller_tier_a_quota_is_the_same_part():
    quotas = Quotas(500, {b"t": 100}, whole=1000)
    assert (quotas.limit(b"x", 1000), quotas.limit(b"x", 200)) == (500, 100)
    assert (quotas.limit(b"t", 1000), quotas.limit(b"t", 200)) == (100, 20)
    assert Quotas(own={b"t": 1}).limit(b"x", 10) is None
    assert not Quotas()


@given(st.dictionaries(st.binary(min_size=1, max_size=1), st.integers(1, 99), max_size=5))
def test_shares_fit_together_and_are_no_more_than_quotas(own):
    shares = Quotas(own=own, whole=100).shares([*own, b"without"], 100)
    assert sum(shares.values()) <= 100
    assert shares[b"without"] == 0
    assert all(shares[tenant] <= quota for tenant, quota in own.items())
    assert shares == own | {b"without": 0} or sum(own.values()) > 100


def test_a_full_quota_says_which_setting_to_change():
    tier = HostTier(10 * NBYTES)
    with pytest.raises(TierFull, match="tenant_quota_bytes"):
        tier.put(items(CHAINS[0][:2], MODEL), limits={TAGS[0]: NBYTES})
    assert tier.used_bytes == 0


def test_settings_become_quotas_and_impossible_ones_are_refused(tmp_path):
    tags = {TAGS[0].hex(): 7}
    config = StoreConfig(disk_path=str(tmp_path), tenant_quota_bytes=9, tenant_quotas=tags)
    quotas = config.quotas()
    assert quotas.limits(TAGS, config.disk_bytes) == dict(zip(TAGS, [7, 9, 9]))
    assert not StoreConfig().quotas()
    for wrong in ({"tenant_quota_bytes": 0}, {"tenant_quotas": {"me": 5}}):
        with pytest.raises(ValueError, match="quota"):
            StoreConfig(**wrong)


def test_a_quota_can_be_given_while_the_store_is_open(disk):
    with store_of(disk, Quotas(whole=6 * COST)) as store:
        store.put(items(CHAINS[0][:5], MODEL))
        store.flush()
        store.limit(TAGS[0], 2 * COST)
        store.put(items(SINGLES[0][:1], MODEL))
        store.flush()
        assert used(disk) == [2 * COST, 0, 0]


def test_further_quotas_do_not_read_anew_what_the_disk_holds(disk, monkeypatch):
    asked = []
    residents = disk.residents
    with store_of(disk, Quotas(whole=6 * COST)) as store:
        monkeypatch.setattr(disk, "residents", lambda: asked.append(disk) or residents())
        for tag in TAGS:
            store.limit(tag, 2 * COST)
        assert len(asked) == 1


OTHER = """
import sys
from pathlib import Path
from kvstore.config import StoreConfig
from kvstore.store import TieredStore
from tests.kvstore.test_quotas import *
with TieredStore.open(StoreConfig(host_bytes=0, disk_path=sys.argv[1], disk_bytes=6 * COST)) as s:
    s.put(items(SINGLES[0][:3], MODEL))
"""


def test_bytes_of_another_process_count(disk, tmp_path):
    with store_of(disk, Quotas(2 * COST, whole=6 * COST)) as store:
        store.put(items(SINGLES[0][3:4], MODEL))
        store.flush()
        subprocess.run([sys.executable, "-c", OTHER, tmp_path / "store"], check=True, timeout=60)
        assert used(disk) == [4 * COST, 0, 0]
        store.put(items(SINGLES[0][4:5], MODEL))
        store.flush()
        assert used(disk) == [2 * COST, 0, 0]
        assert store.audit().clean


class Shelf:
    """What a tier under LRU should hold: the names of each tenant, least recently used first."""

    def __init__(self, room, quotas):
        self.room, self.quotas = room, quotas  # in blocks; a quota may be None
        self.names = {tenant: [] for tenant in range(3)}

    def share(self, tenant, there):
        quotas = {t: self.quotas[t] or 0 for t in there}
        total = sum(quotas.values())
        return quotas[tenant] * min(1, self.room / total) if total else 0

    def put(self, tenant, name, pinned):
        if name in self.names[tenant]:
            return
        left = {t: list(names) for t, names in self.names.items()}
        free = {t: [x for x in names if (t, x) not in pinned] for t, names in self.names.items()}

        def drop(t):
            left[t].remove(free[t].pop(0))

        own, quota = left[tenant], self.quotas[tenant]
        while quota is not None and len(own) + 1 > quota and free[tenant]:
            drop(tenant)
        if quota is not None and len(own) + 1 > quota:
            return
        there = {t for t in left if self.names[t]} | {tenant}
        closed = set()
        while sum(map(len, left.values())) + 1 > self.room:
            above = {t: len(left[t]) + (t == tenant) - self.share(t, there) for t in there - closed}
            over = [t for t in above if above[t] > 1e-9]
            t = max(over, key=lambda t: (above[t], TAGS[t]), default=None)
            if t is None:
                if not free[tenant]:
                    return
                t = tenant
            elif not free[t] or (t != tenant and above[t] < 1 - 1e-9):
                closed.add(t)
                continue
            drop(t)
        own.append(name)
        self.names = left

    def use(self, tenant, name):
        if name in self.names[tenant]:
            self.names[tenant].remove(name)
            self.names[tenant].append(name)


class QuotaMachine(RuleBasedStateMachine):
    """Host and disk against a model that says exactly who is there."""

    @initialize(
        rooms=st.tuples(st.integers(1, 6), st.integers(3, 9)),
        parts=st.tuples(*[st.none() | st.integers(1, 9)] * 3),
    )
    def open(self, rooms, parts):
        host, disk = rooms
        self.folder = Path(tempfile.mkdtemp())
        self.rooms = host, disk
        own = {TAGS[t]: part * COST for t, part in enumerate(parts) if part is not None}
        own.setdefault(bytes(8), COST)  # there are quotas, of somebody who never comes
        self.quotas = Quotas(own=own, whole=disk * COST)
        limits = [self.quotas.limit(tag, host * NBYTES) for tag in TAGS]
        in_host = [None if limit is None else Fraction(limit, NBYTES) for limit in limits]
        self.shelves = [Shelf(host, in_host), Shelf(disk, list(parts))]
        self.pinned = []
        self.start()

    def start(self):
        host, disk = self.rooms
        self.tiers = [HostTier(host * NBYTES), DiskTier(self.folder / "store", disk * COST)]
        self.store = TieredStore(self.tiers, quotas=self.quotas)

    @rule()
    def reopen(self):
        self.unpin_all()
        self.store.close()
        self.shelves[0] = Shelf(self.rooms[0], self.shelves[0].quotas)
        self.start()

    @rule(tenant=st.integers(0, 2), name=st.integers(0, 4))
    def put(self, tenant, name):
        self.store.put(items([SINGLES[tenant][name]], MODEL))
        self.store.flush()
        for shelf in self.shelves:
            shelf.put(tenant, name, {pin[1] for pin in self.pinned})

    @rule(tenant=st.integers(0, 2), name=st.integers(0, 4))
    def lookup(self, tenant, name):
        found = self.store.lookup([SINGLES[tenant][name]])
        assert found == any(name in shelf.names[tenant] for shelf in self.shelves)
        for shelf in self.shelves:
            shelf.use(tenant, name)

    @rule(tenant=st.integers(0, 2), name=st.integers(0, 4))
    def pin(self, tenant, name):
        stack = ExitStack()
        stack.enter_context(self.store.pin([SINGLES[tenant][name]]))
        self.pinned.append((stack, (tenant, name)))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self):
        self.pinned.pop()[0].close()

    @invariant()
    def exactly_these_are_there(self):
        if not hasattr(self, "store"):
            return
        for tier, shelf, cost in zip(self.tiers, self.shelves, (NBYTES, COST)):
            assert used(tier) == [len(shelf.names[t]) * cost for t in range(3)]
            for tenant, keys in enumerate(SINGLES):
                held = {i for i, is_ in enumerate(tier.held(keys)) if is_}
                assert held == set(shelf.names[tenant])
            assert tier.used_bytes == sum(used(tier)) <= tier.capacity_bytes

    def unpin_all(self):
        while self.pinned:
            self.unpin()

    def teardown(self):
        if hasattr(self, "store"):
            self.unpin_all()
            assert self.store.audit().clean
            self.store.close()
            shutil.rmtree(self.folder)


TestQuotasAgainstAModel = QuotaMachine.TestCase
TestQuotasAgainstAModel.settings = settings(max_examples=20, stateful_step_count=40)


class ChainMachine(RuleBasedStateMachine):
    """Chains under any policy: nobody above its quota, nobody pushed below its share."""

    @initialize(
        policy=st.sampled_from(list(POLICIES)),
        room=st.integers(2, 12),
        parts=st.tuples(*[st.none() | st.integers(1, 12)] * 3),
    )
    def open(self, policy, room, parts):
        own = {TAGS[t]: part * NBYTES for t, part in enumerate(parts) if part is not None}
        self.tier = HostTier(room * NBYTES)
        self.quotas = Quotas(own=own, whole=room * NBYTES)
        self.store = TieredStore([self.tier], quotas=self.quotas, policy=policy)

    @rule(tenant=st.integers(0, 2), start=st.integers(0, 2), count=st.integers(1, 6))
    def put(self, tenant, start, count):
        before, room = used(self.tier), self.tier.capacity_bytes
        there = {t for t, n in zip(TAGS, before) if n} | {TAGS[tenant]}
        self.store.put(items(CHAINS[tenant][start : start + count], MODEL))
        shares, after = self.quotas.shares(there, room), used(self.tier)
        for other in {0, 1, 2} - {tenant}:
            assert after[other] >= min(before[other], shares.get(TAGS[other], 0))
        for tag, nbytes in zip(TAGS, after):
            limit = self.quotas.limit(tag, room)
            assert limit is None or nbytes <= limit

    @rule(tenant=st.integers(0, 2))
    def lookup(self, tenant):
        keys = CHAINS[tenant]
        found = self.store.lookup(keys)
        assert all(right(self.store.get(key), key, MODEL) for key in keys[:found])
        assert not any(self.tier.held(keys[found:]))  # what is there is a chain's beginning

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()


TestQuotasOfChains = ChainMachine.TestCase
TestQuotasOfChains.settings = settings(max_examples=60, stateful_step_count=30)
