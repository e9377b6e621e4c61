"""A small store of a few chains: what is in it, and whether that is as it must be."""

import gc
import os
from functools import cache

from kvstore import layout
from kvstore.disk import fetch, guard
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from native.library import library
from tests.kvstore.make import chain, identity, items, same
from tests.kvstore.stored import values_file

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)
BLOCKS = 6  # per chain
CHAINS = 8
ROOMY, TIGHT = 1000, 4 * BLOCKS  # blocks that a store has room for
FILES = ["data.mdb", "lock.mdb", "values", "verified"]  # and nothing else, each of them once


@cache
def keys_of(number):
    return chain(range(1000 * number, 1000 * number + 4 * BLOCKS), model=MODEL)


@cache
def items_of(number):
    return items(keys_of(number), MODEL)


def warm():
    """Have what every child needs, so that none has to make it."""
    for number in range(CHAINS):
        items_of(number)
    for source in (fetch.SOURCE, guard.SOURCE):
        library(source)
    gc.freeze()


def opened(folder, blocks=ROOMY):
    """A block is of two records."""
    data = items_of(0)[0][1].data
    layout.TARGET_BYTES = data.nbytes // 2
    return TieredStore([DiskTier(folder, blocks * entry_cost(data))])


def tier_of(store):
    return store._levels[-1].tier


def out_of_place(folder):
    """What is in the folder of a store beside its files, or is not, in sentences."""
    names = sorted(name.partition("-")[0] for name in os.listdir(folder))
    return [] if names == FILES else [f"the folder holds {sorted(os.listdir(folder))}"]


def too_large(folder, blocks):
    """Whether the values take more than the budget and two batches, in sentences."""
    size = values_file(folder).stat().st_size
    most = (blocks + 2 * BLOCKS) * entry_cost(items_of(0)[0][1].data)
    return [] if size <= most else [f"the values take {size} bytes of at most {most}"]


def held(store):
    """How many blocks there are of each chain; counts as no use of them."""
    return [sum(tier_of(store).held(keys_of(number))) for number in range(CHAINS)]


def wrong_among(number, found):
    """How many of the blocks found of a chain, or None, are not what was written."""
    pairs = zip(found, items_of(number), strict=True)
    return sum(got is not None and not same(got.data, put.data) for got, (_, put) in pairs)


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
            wrong += wrong_among(number, found)
        problems += out_of_place(folder) or too_large(folder, blocks)
        if tier_of(store).corrupt:
            problems.append(f"{tier_of(store).corrupt} blocks are damaged")
    say({"state": state, "wrong": wrong, "problems": problems})
