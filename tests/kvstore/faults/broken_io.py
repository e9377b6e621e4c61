"""A disk that fails: calls on a store's two files that give an error, do half, or end the process.

Needs `broken_io.c`, loaded before libc. What was acknowledged is there afterwards, and right;
what was not, is there whole or not at all; who asked for it got a StoreError. A process whose disk
works again works again itself.
"""

import ctypes
import errno
import random
import shutil
import signal
import subprocess
from collections import defaultdict
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

from kvstore.disk.compact import compact
from kvstore.disk.environment import files_of
from kvstore.errors import StoreError
from tests.kvstore.cold import drop
from tests.kvstore.faults.children import ended
from tests.kvstore.faults.count import Count
from tests.kvstore.faults.phases import fill
from tests.kvstore.faults.state import (
    BLOCKS,
    CHAINS,
    examine,
    items_of,
    keys_of,
    opened,
    out_of_place,
    tier_of,
    wrong_among,
)

SOURCE = Path(__file__).with_suffix(".c")
WRITE, SYNC, READ = range(3)
TABLES, VALUES = range(2)
HALF, TORN = -1, -2  # as in the source
SORTS = ("write", "sync", "read")
FILES = ("tables", "values")
HOW = {errno.EIO: "EIO", errno.ENOSPC: "ENOSPC", HALF: "half", TORN: "half, killed"}
PUTS, DELETES = (1, 3, 5), (0, 2, 4)  # chains; by turns
LAST = 7  # put when the disk works again


class Fault(NamedTuple):
    """The n-th call of a sort on a file, or all from it on."""

    file: int
    sort: int
    n: int
    how: int  # errno, HALF or TORN
    lasts: bool = False

    def begin(self):
        ctypes.CDLL(None).break_io(*map(int, self))

    @staticmethod
    def end():
        """How many calls of each sort there were on each file."""
        code = ctypes.CDLL(None)
        calls = [[code.io_calls(file, sort) for sort in range(3)] for file in range(2)]
        code.break_io(*map(int, HEALTHY))
        return calls


HEALTHY = Fault(TABLES, WRITE, 0, 0)


def compiled(folder, source=SOURCE):
    """The compiled source, to be loaded before libc."""
    made = folder / f"{source.stem}.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed to break what the store calls"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, "-o", made, source, "-ldl"], check=True)
    return made


def change(say, folder, fault):
    """Put and delete chains; says before each change how many blocks of each chain may be there."""
    may = [[BLOCKS * (number % 2 == 0)] for number in range(CHAINS)]
    with opened(folder) as store:
        fault.begin()
        done = [attempt(say, store, number, may) for pair in zip(PUTS, DELETES) for number in pair]
        calls = fault.end()
        found = [store.lookup(keys_of(number)) for number in range(CHAINS)]  # at worst misses
        assert all(store.get(keys_of(number)[0]) for number, there in enumerate(found) if there)
        again = attempt(say, store, LAST, may)
        say({"may": may, "calls": calls, "refused": done.count(False), "again": again})


def attempt(say, store, number, may):
    """Whether a change was acknowledged."""
    becomes = 0 if number in DELETES else BLOCKS
    may[number] = [*may[number], becomes]
    say({"may": may})
    try:
        if number in DELETES:
            store.delete(keys_of(number)[:1])
        else:
            store.put(items_of(number))
            store.flush()
    except StoreError:
        return False
    may[number] = [becomes]
    return True


def squeeze(say, folder, fault):
    """Compact a store."""
    may = [[BLOCKS * (number % 2 == 0)] for number in range(CHAINS)]
    say({"may": may})
    fault.begin()
    refused = 0
    try:
        compact(folder)
    except StoreError:
        refused = 1
    calls = fault.end()
    assert not out_of_place(folder), "a copy that failed takes no room"
    compact(folder)
    say({"may": may, "calls": calls, "refused": refused, "again": True})


def read(say, folder, fault):
    """Read all blocks in one of the ways: misses are allowed, and may be deleted."""
    for file in files_of(folder):
        drop(file)
    with opened(folder) as store:
        ways = tier_of(store).access.env.ways
        ways._mapped_at = 0
        if fault.n % 2:
            for number in range(CHAINS):
                [store.get(key) for key in keys_of(number)]  # by now they are in the page cache
        fault.begin()
        found = [[store.get(key) for key in keys_of(number)] for number in range(CHAINS)]
        calls = fault.end()
        wrong = sum(wrong_among(number, found[number]) for number in range(CHAINS))
        may = [list(range(BLOCKS + 1)) if number % 2 == 0 else [0] for number in range(8)]
        for number in range(0, CHAINS, 2):
            if all(block is not None for block in found[number]):
                may[number] = [BLOCKS]
        misses = sum(block is None for number in range(0, CHAINS, 2) for block in found[number])
        say({"may": may, "calls": calls, "refused": misses, "again": True, "wrong": wrong})


LIVES = {change: (WRITE, SYNC), squeeze: (WRITE, SYNC), read: (READ,)}


def faults_of(life, calls):
    """All faults that one life can meet."""
    for file, sort in product((TABLES, VALUES), LIVES[life]):
        hows = [errno.EIO, errno.ENOSPC, HALF, TORN]
        if sort == SYNC:
            hows.remove(HALF)
        if sort == READ:
            hows = [errno.EIO, HALF]
        for n, how in product(range(1, calls[file][sort] + 1), hows):
            yield Fault(file, sort, n, how)
            if how != TORN:
                yield Fault(file, sort, n, how, True)


def broken(folder, rounds, seed):
    """So many faults, of each file, each sort and each life, in any order."""
    count, dice, whole = Count(), random.Random(seed), folder / "whole"
    count.ended(ended(fill, whole))
    sorts = defaultdict(list)  # as many rounds for each of them
    for life in LIVES:
        healthy = one(folder, whole, life, HEALTHY, Count())
        for fault in faults_of(life, healthy["calls"]):
            sorts[life, fault.file, fault.sort, fault.how].append(fault)
    for _, (life, *sort) in zip(range(rounds), cycle(sorts)):
        one(folder, whole, life, dice.choice(sorts[life, *sort]), count)
    return count


def one(folder, whole, life, fault, count):
    """One life under one fault, and what is left of the store; the last that it said."""
    here = folder / "store"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(whole, here)
    child = ended(life, here, fault)
    last = child.said[-1]
    torn = fault.how == TORN
    count.ended(child, allowed=(-signal.SIGKILL,) if torn else (0,))
    count.wrong += last.get("wrong", 0)
    calls = last.get("calls")
    assert calls is None or any(map(any, calls)), "broken_io.c is not loaded, or not called"
    name = f"{life.__name__}, {FILES[fault.file]}, {SORTS[fault.sort]} {HOW.get(fault.how, '')}"
    count.outcomes[name] += 1
    if not torn and last.get("refused"):
        count.outcomes["refused, or missed"] += 1
        count.outcomes["works again"] += last["again"]
        if fault.file == VALUES and not last["again"]:
            count.fail(f"{name}, {fault}: the store works no more until it is opened again")
    check(count, ended(examine, here), last["may"], (name, fault))
    return last


def check(count, found, may, about):
    count.rounds += 1
    if not count.ended(found):
        return
    [seen] = found.said
    count.wrong += seen["wrong"]
    count.lost += sum(max(0, min(ok) - is_) for ok, is_ in zip(may, seen["state"]))
    if seen["problems"] or any(is_ not in ok for ok, is_ in zip(may, seen["state"])):
        count.fail(f"{about}: {seen['state']} where {may} may be: {seen['problems']}")
