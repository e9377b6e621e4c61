"""A small store of a few chains: what is in it, and whether that is as it must be."""

import os

from kvstore import layout
from kvstore.disk import DiskTier
from kvstore.ledger import entry_cost
from kvstore.store import TieredStore
from tests.kvstore.make import chain, content, identity, items, right

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)
BLOCKS = 6  # per chain
CHAINS = 8
ROOMY, TIGHT = 1000, 4 * BLOCKS  # blocks that a store has room for
FILES = {"data.mdb", "lock.mdb", "verified"}


def keys_of(number):
    return chain(range(1000 * number, 1000 * number + 4 * BLOCKS), model=MODEL)


def items_of(number):
    return items(keys_of(number), MODEL)


def opened(folder, blocks=ROOMY):
    """A block is of two records."""
    layout.TARGET_BYTES = content(keys_of(0)[0], MODEL).nbytes // 2
    return TieredStore([DiskTier(folder, blocks * entry_cost(content(keys_of(0)[0], MODEL)))])


def tier_of(store):
    return store._levels[-1].tier


def held(store):
    """How many blocks there are of each chain; counts as no use of them."""
    return [sum(tier_of(store).held(keys_of(number))) for number in range(CHAINS)]


def examine(say, folder, blocks=ROOMY):
    """What a child finds that opens a store: its state, wrong blocks, and what is not clean."""
    with opened(folder, blocks) as store:
        problems = store.audit().problems
        state, wrong = held(store), 0
        for number in range(CHAINS):
            found = [store.get(key) for key in keys_of(number)]
            there = [block is not None for block in found]
            if there != [True] * state[number] + [False] * (BLOCKS - state[number]):
                problems.append(f"of chain {number} there is {there}")
            pairs = zip(keys_of(number), found, strict=True)
            wrong += sum(block is not None and not right(block, k, MODEL) for k, block in pairs)
        problems += [f"left behind: {name}" for name in set(os.listdir(folder)) - FILES]
    say({"state": state, "wrong": wrong, "problems": problems})
