"""Reads of blocks whose pages become others' after their entry was found, before they are copied.

Such a read is a miss, or what was asked for: never another's KV, and never taken for damage.
"""

import os
import random
from collections import Counter
from contextlib import suppress

import torch

from kvstore.disk import loads
from kvstore.disk.loads import records
from kvstore.disk.values import Values
from tests.kvstore.faults.children import Child, ended
from tests.kvstore.faults.count import Count
from tests.kvstore.faults.others import damaged, note, put
from tests.kvstore.faults.phases import fill
from tests.kvstore.faults.state import BLOCKS, examine, held, items_of, keys_of, opened, tier_of
from tests.kvstore.make import same

READ, NEW = 0, 1  # chains
TURNS = 20
FATES = ("kept", "gone", "taken", "moved")
WAYS = ("get", "read_many", "records")
MANY = {0: "none", BLOCKS: "all"}


def overtaking(say, folder, pipe):
    """Do to the chain that another process reads what it says in the pipe."""
    os.close(pipe[1])
    with opened(folder) as store:
        say("open")
        while fate := os.read(pipe[0], 1):
            overtake(store, FATES[fate[0]])
            say("done")


def overtake(store, fate):
    if fate != "kept":
        store.delete(keys_of(READ)[:1])
    if fate in ("taken", "moved"):
        put(store, NEW)  # there are no other free pages that fit as well
    if fate == "moved":
        put(store, READ)


def prepare(store):
    """The pages of the chain are the only ones that are free once it is deleted."""
    store.delete([keys_of(number)[0] for number in (READ, NEW) if held(store)[number]])
    put(store, READ)


class Late:
    """Lets the other process overtake the next copy of what is in the file."""

    def __init__(self, other, pipe):
        self._other, self._pipe, self._fate = other, pipe, None

    def __call__(self, whole):
        def late(*args):
            if self._fate is not None:
                os.write(self._pipe, bytes([FATES.index(self._fate)]))
                self._fate = None
                self._other.hear()
            return whole(*args)

        return late

    def meet(self, fate):
        self._fate = fate


def found_by(tier, way):
    """The blocks of the chain, or None, read in one of the ways."""
    keys, data = keys_of(READ), items_of(READ)[0][1].data
    if way == "get":
        found = [tier.get(key) for key in keys]
        return [None if block is None else block.data for block in found]
    if way == "read_many":
        out = torch.empty(len(keys), *data.shape, dtype=data.dtype)
        there = tier.read_many(keys, range(len(data)), out)
        return [row if is_ else None for row, is_ in zip(out, there, strict=True)]
    return [stored(records(tier.access, key.digest), data) for key in keys]


def stored(found, data):
    """The KV of a block of raw records; None without them."""
    if found is None:
        return None
    entry, records = found
    payload = b"".join(bytes(r[-n:]) for r, n in zip(records, entry.sizes, strict=True))
    return torch.frombuffer(bytearray(payload), dtype=data.dtype).view(data.shape)


def reading(say, folder, seed):
    dice, pipe = random.Random(seed), os.pipe()
    other = Child(overtaking, folder, pipe)
    other.hear()
    os.close(pipe[0])
    late, seen, wrong, problems = Late(other, pipe[1]), Counter(), 0, []
    loads.copy, Values.record = late(loads.copy), late(Values.record)
    with opened(folder) as store:
        tier = tier_of(store)
        for _ in range(TURNS):
            fate, way = dice.choice(FATES), dice.choice(WAYS)
            prepare(store)
            late.meet(fate)
            found = found_by(tier, way)
            pairs = zip(found, items_of(READ), strict=True)
            wrong += sum(got is not None and not same(got, put.data) for got, (_, put) in pairs)
            there = sum(got is not None for got in found)
            seen[f"{fate}, {way}: {MANY.get(there, 'some')}"] += 1
            if there not in {"kept": [BLOCKS], "taken": [0]}.get(fate, range(BLOCKS + 1)):
                problems.append(f"{there} blocks, {fate}, by {way}")
            if fate == "moved" and sum(got is not None for got in found_by(tier, way)) < BLOCKS:
                problems.append(f"a chain that has moved is missed by {way}")
        problems += damaged(store)
    with suppress(OSError):
        os.close(pipe[1])
    problems += [] if other.join().code == 0 else ["the other process failed"]
    say({"wrong": wrong, "problems": problems, "seen": seen})


def overtaken(folder, rounds, seed):
    count, store = Count(), folder / "store"
    count.ended(ended(fill, store))
    for number in range(rounds):
        child = ended(reading, store, seed + number)
        note(count, child)
        count.outcomes.update(child.said[-1]["seen"] if child.said else {})
    note(count, ended(examine, store))
    return count
