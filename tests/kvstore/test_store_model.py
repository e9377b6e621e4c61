"""The store against a dict, under every order of operations that hypothesis can think of."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items, right, same

MODEL = identity(num_layers=2, head_dim=4)
CHAINS = [  # two that share a block, and one of another tenant
    chain(range(20), model=MODEL),
    chain([*range(4), *range(50, 62)], model=MODEL),
    chain(range(20), model=MODEL, tenant=b"other"),
]
COST = entry_cost(content(CHAINS[0][0], MODEL))
BYTES = content(CHAINS[0][0], MODEL).nbytes

CHAIN = st.sampled_from(CHAINS)
LENGTH = st.integers(0, 5)
KEY = CHAIN.flatmap(st.sampled_from)


class StoreMachine(RuleBasedStateMachine):
    """Content follows from the key, so the dict is `content`, less what was evicted."""

    @initialize(host=st.integers(1, 6), disk=st.integers(1, 9))
    def open(self, host, disk):
        self.folder = Path(tempfile.mkdtemp())
        self.budgets = host * BYTES + 7, disk * COST + 7
        self.known = set()  # put since the last clear
        self.whole = set()  # those of them put with all their ancestors
        self.pins = []  # (exit stack, keys seen while pinned)
        self.reopen()

    @rule()
    def reopen(self):
        self.unpin_all()
        if hasattr(self, "store"):
            self.store.close()
        self.disk = DiskTier(self.folder / "store", self.budgets[1])
        self.store = TieredStore([HostTier(self.budgets[0]), self.disk], queue_bytes=2 * BYTES)

    @rule(keys=CHAIN, n=LENGTH)
    def put(self, keys, n):
        self.store.put(items(keys[:n], MODEL))
        self.known |= set(keys[:n])
        self.whole |= set(keys[:n])

    @rule(keys=CHAIN, start=st.integers(0, 3), n=LENGTH)
    def put_what_may_have_no_parent(self, keys, start, n):
        self.store.put(items(keys[start : start + n], MODEL))
        self.known |= set(keys[start : start + n])

    @rule(key=KEY)
    def get(self, key):
        block = self.store.get(key)
        assert block is None or (key in self.known and right(block, key, MODEL))

    @rule(key=KEY, lo=st.integers(0, 1), n=st.integers(1, 2))
    def read(self, key, lo, n):
        layers = range(lo, min(lo + n, 2))
        data = self.store.read(key, layers)
        wanted = content(key, MODEL)[lo : layers.stop]
        assert data is None or (key in self.known and same(data, wanted))

    @rule(keys=CHAIN)
    def lookup(self, keys):
        self.store.flush()
        found = self.store.lookup(keys)
        self.all_readable(keys[:found])
        assert found == len(keys) or self.store.get(keys[found]) is None

    @rule(keys=CHAIN)
    def pin(self, keys):
        stack = ExitStack()
        stack.enter_context(self.store.pin(keys))
        self.pins.append((stack, keys[: self.store.lookup(keys)]))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.pins.pop()[0].close()

    @rule(keys=CHAIN)
    def promote(self, keys):
        self.store.flush()
        host = self.store._levels[0].tier
        count = self.store.promote(keys)
        assert all(key in host for key in keys[:count])
        self.all_readable(keys[:count])

    @precondition(lambda self: not self.pins)
    @rule()
    def clear(self):
        self.store.clear()
        self.known.clear()
        self.whole.clear()
        assert not any(self.store.lookup(keys) for keys in CHAINS)

    @rule(repair=st.booleans())
    def audit(self, repair):
        self.store.flush()
        report = self.store.audit(repair)
        assert report.clean, report.problems

    @rule()
    def flushed_puts_are_on_disk_if_there_is_room_for_all(self):
        self.store.flush()
        if len(self.known) * COST <= self.budgets[1]:
            assert all(key in self.disk for key in self.whole)

    @invariant()
    def no_tier_is_over_its_budget(self):
        if hasattr(self, "store"):
            for tier in self.store.stats().tiers.values():
                assert 0 <= tier.used_bytes <= tier.capacity_bytes

    @invariant()
    def what_was_found_while_pinned_is_still_there(self):
        for _, keys in getattr(self, "pins", []):
            self.all_readable(keys)

    def all_readable(self, keys):
        for key in keys:
            block = self.store.get(key)
            assert block is not None
            assert right(block, key, MODEL)

    def unpin_all(self):
        while self.pins:
            self.unpin()

    def teardown(self):
        if hasattr(self, "store"):
            self.unpin_all()
            self.store.close()
            shutil.rmtree(self.folder)


TestStoreAgainstADict = StoreMachine.TestCase
TestStoreAgainstADict.settings = settings(stateful_step_count=30)
