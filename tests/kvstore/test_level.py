"""A tier under its policy: what is found while it is pinned stays."""

import threading
from collections import Counter

from kvstore.level import Level
from kvstore.tier import HostTier
from tests.kvstore.make import chain, items


class Halting(HostTier):
    """Stops before it evicts until somebody asks what it holds, whom it then overtakes."""

    def __init__(self, capacity_bytes):
        super().__init__(capacity_bytes)
        self.evicting, self.asked, self.done = (threading.Event() for _ in range(3))
        self.asker = threading.current_thread()

    def put(self, blocks, victims=()):
        if victims:
            self.evicting.set()
            assert self.asked.wait(10)
        return super().put(blocks, victims)

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
