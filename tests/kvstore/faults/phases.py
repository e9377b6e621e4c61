"""Processes that are killed in every phase of what a store does.

A process says what the store holds before it does anything, kills itself in the midst of that, and
another one opens what is left: it holds what it did before, or, behind a commit, what it should by
then, and all of that is right.
"""

import io
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

from kvstore.disk import compact, environment, portable, sound
from kvstore.disk.ledger import Ledger
from kvstore.disk.readers import Readers
from kvstore.disk.space import Space
from kvstore.disk.tier import DiskTier
from kvstore.disk.values import Values
from kvstore.level import Level
from tests.kvstore.faults.children import Child, ended
from tests.kvstore.faults.count import Count
from tests.kvstore.faults.points import Point
from tests.kvstore.faults.state import (
    BLOCKS,
    CHAINS,
    ROOMY,
    TIGHT,
    examine,
    held,
    items_of,
    keys_of,
    opened,
    tier_of,
)

OPERATIONS = 200  # until which a process must have met its point


def churn(say, folder, phase, seed):
    """Put and delete chains for ever, or, in a tight store, put them."""
    dice = random.Random(seed)
    with opened(folder, phase.blocks) as store:
        for turn in range(OPERATIONS):
            if turn == 1:
                phase.point.arm(dice)
            step(say, store, dice, deletes=phase.blocks == ROOMY)


def step(say, store, dice, *, deletes):
    """One change, said before."""
    state = held(store)
    number = dice.choice([n for n in range(CHAINS) if deletes or not state[n]])
    leaves = deletes and bool(state[number])
    becomes = 0 if leaves else BLOCKS
    say({"state": state, "number": number, "becomes": becomes})
    if leaves:
        store.delete(keys_of(number)[:1])
    else:
        store.put(items_of(number))
        store.flush()
    assert held(store)[number] == becomes, "it was acknowledged"


def compacting(say, folder, phase, seed):
    dice = random.Random(seed)
    with opened(folder) as store:
        for _ in range(dice.randrange(4)):
            step(say, store, dice, deletes=True)
        while not any(held(store)):  # there must be something to compact
            step(say, store, dice, deletes=True)
        say({"state": held(store)})
    phase.point.arm(dice)
    compact.compact(folder)


def importing(say, folder, phase, seed):
    """Take in a file of all chains, and say what is there after each; deletes them again."""
    dice, file = random.Random(seed), io.BytesIO(Path(folder).with_suffix(".blocks").read_bytes())
    with opened(folder) as store:
        phase.point.arm(dice)
        blocks, batch = portable.imported(file), []
        say({"state": held(store)})
        for item in blocks:
            batch.append(item)
            if len(batch) == BLOCKS:
                store.put(batch)
                store.flush()
                say({"state": held(store)})
                batch = []


def opening(say, folder, phase, seed):
    """Open a store, if there is one as if compaction had been killed and the machine restarted."""
    dice = random.Random(seed)
    if folder.exists():
        (folder / "verified").unlink(missing_ok=True)
        (folder / f"{environment.UNFINISHED}made").mkdir(exist_ok=True)
        environment.new_values(folder)
    phase.point.arm(dice)
    opened(folder).close()


class Phase(NamedTuple):
    """What a process does, and where it is killed."""

    life: object
    point: Point
    committed: bool = False  # by then
    blocks: int = ROOMY
    empty: bool = False  # from an empty folder each time


def _comes(_ledger, _txn, _entry, blocks):
    return blocks == 1


def _goes(_ledger, _txn, _entry, blocks):
    return blocks == -1


def _any(_ledger, _txn, digests):
    return bool(digests)


def _changed(space, _txn, _used):  # not where pages are given back behind a deletion
    return space._free is not None or space._back or space._doubtful


def _given(space, _txn, _used):
    return bool(space._back)


RECORDS = 2 * BLOCKS
WRITING = {  # once in a store that has room, once where pages of others are used again
    "pages taken": Point(Space, "take", True, BLOCKS),
    "before the first record": Point(DiskTier, "_write", False, 2),
    "between records": Point(Values, "write", True, RECORDS),
    "written, not flushed": Point(Values, "sync", False, 2),
    "flushed, without entries": Point(Values, "sync", True, 2),
    "between entries": Point(Ledger, "add", True, 2 * BLOCKS),
    "before free pages are noted": Point(Space, "settle", False, 2, _changed),
    "before the commit": Point(Space, "settle", True, 2, _changed),
}
PHASES = {
    **{f"putting: {name}": Phase(churn, point) for name, point in WRITING.items()},
    **{f"evicting: {name}": Phase(churn, point, False, TIGHT) for name, point in WRITING.items()},
    "before the index entry": Phase(churn, Point(Ledger, "_count", False, BLOCKS, _comes)),
    "after the commit": Phase(churn, Point(Readers, "check", False, 3), committed=True),
    "evicting": Phase(churn, Point(Ledger, "_count", False, BLOCKS, _goes), blocks=TIGHT),
    "evicted": Phase(churn, Point(Ledger, "_remove", True, BLOCKS), blocks=TIGHT),
    "evicted, committed": Phase(
        churn, Point(Readers, "check", False, 3), committed=True, blocks=TIGHT
    ),
    "deleting: counting": Phase(churn, Point(Ledger, "_count", False, BLOCKS, _goes)),
    "deleting: counted": Phase(churn, Point(Ledger, "_remove", True, BLOCKS)),
    "deleted": Phase(churn, Point(Ledger, "remove_trees", True, 2, _any)),
    "deleted, free pages noted": Phase(churn, Point(Space, "settle", True, 2, _given)),
    "after a deletion": Phase(churn, Point(DiskTier, "delete", True, 2), committed=True),
    "deleted: giving pages back": Phase(churn, Point(Values, "punch", False, 2), committed=True),
    "deleted: gave pages back": Phase(churn, Point(Values, "punch", True, 2), committed=True),
    "compacting: tables copied": Phase(compacting, Point(compact, "_copy_values")),
    "compacting: copying values": Phase(compacting, Point(compact, "_copy", True, BLOCKS)),
    "compacting: values copied": Phase(compacting, Point(os, "fsync")),
    "compacting: values flushed": Phase(compacting, Point(os, "fsync", True)),
    "compacting: tables changed": Phase(compacting, Point(compact, "_copy_values", True)),
    "compacting: tables changed again": Phase(compacting, Point(compact, "say_again", True)),
    "compacting: replacing": Phase(compacting, Point(os, "replace")),
    "compacting: replaced": Phase(compacting, Point(os, "replace", True)),
    "compacting: deleting old values": Phase(compacting, Point(Path, "unlink")),
    "compacting: deleted old values": Phase(compacting, Point(Path, "unlink", True)),
    "importing: reading": Phase(importing, Point(portable, "_block", True, CHAINS), empty=True),
    "importing: writing": Phase(importing, Point(Values, "write", True, RECORDS), empty=True),
    "importing: adding": Phase(importing, Point(Ledger, "add", False, RECORDS), empty=True),
    "creating: values": Phase(opening, Point(environment, "new_values", True), empty=True),
    "creating: before": Phase(opening, Point(os, "rename"), empty=True),
    "creating: after": Phase(opening, Point(os, "rename", True), empty=True),
    "opening: as found": Phase(opening, Point(environment, "_prepare")),
    "opening: verifying": Phase(opening, Point(sound, "verify_file", True)),
    "opening: verified": Phase(opening, Point(environment, "verify_after_boot", True)),
    "opening: cleaning": Phase(opening, Point(environment, "_alone")),
    "opening: folder deleted": Phase(opening, Point(shutil, "rmtree", True)),
    "opening: values deleted": Phase(opening, Point(Path, "unlink", True)),
    "opening: cleaned": Phase(opening, Point(environment, "_clean", True)),
    "opening: reading": Phase(opening, Point(Level, "_seed", True)),
}


def fill(_say, folder, blocks=ROOMY):
    with opened(folder, blocks) as store:
        for number in range(0, CHAINS, 2):
            store.put(items_of(number))
        store.flush()


def export(_say, folder):
    with opened(folder) as store:
        for number in range(CHAINS):
            store.put(items_of(number))
        store.flush()
        portable.export(tier_of(store), folder.with_suffix(".blocks"), lambda _entry: True)


def kill_in(phase, folder, rounds, seed, count):
    """So many lives and deaths in one phase."""
    dice = random.Random(seed)
    if phase.life is importing:
        count.ended(ended(export, folder))
        shutil.rmtree(folder)
    if not phase.empty:
        count.ended(ended(fill, folder, phase.blocks))
    state = [BLOCKS * (number % 2 == 0) for number in range(CHAINS)]
    for _ in range(rounds):
        if phase.empty:
            shutil.rmtree(folder, ignore_errors=True)
            state = [0] * CHAINS
        dead = ended(phase.life, folder, phase, dice.randrange(1 << 30))
        if not count.ended(dead, allowed=(-signal.SIGKILL,)):
            return
        last = dead.said[-1] if dead.said else {"state": state}
        state = last["state"]
        states = changed(phase.blocks, **last) if phase.committed else [state]
        compare(count, ended(examine, folder, phase.blocks), states, phase.point.name)


def changed(room, state, number, becomes):
    """The states that a change may lead to: where there is no room, some other chain goes."""
    after = [*state]
    after[number] = becomes
    if sum(after) <= room:
        return [after]
    return [
        [0 if victim == other else blocks for other, blocks in enumerate(after)]
        for victim in range(CHAINS)
        if after[victim] and victim != number
    ]


def compare(count, found, states, about):
    """Count what an examination came to, beside states that are right."""
    count.rounds += 1
    if not count.ended(found):
        return
    [seen] = found.said
    count.wrong += seen["wrong"]
    count.lost += min(
        sum(max(0, was - is_) for was, is_ in zip(state, seen["state"])) for state in states
    )
    if seen["problems"] or seen["state"] not in states:
        count.fail(f"{about}: {seen['state']} in place of {states}: {seen['problems']}")


def in_every_phase(folder, rounds, seed):
    """`rounds` in each of the phases."""
    count = Count()
    for name, phase in PHASES.items():
        before = count.rounds
        kill_in(phase, Path(folder) / name.replace(":", "").replace(" ", "_"), rounds, seed, count)
        count.outcomes[name] = count.rounds - before
    return count


def from_outside(folder, rounds, seed):
    """At random moments of puts and deletes."""
    count, dice, phase = Count(), random.Random(seed), Phase(churn, Point(os, "nothing"))
    folder = Path(folder) / "store"
    for _ in range(rounds):
        child = Child(live, folder, phase.blocks, dice.randrange(1 << 30))
        for _ in range(dice.randrange(1, 6)):
            child.hear()
        time.sleep(dice.random() * 0.01)  # the random moment is the point
        child.kill()
        dead = child.join()
        count.ended(dead, allowed=(-signal.SIGKILL,))
        last = dead.said[-1]
        becomes = [*last["state"]]
        becomes[last["number"]] = last["becomes"]
        compare(count, ended(examine, folder), [last["state"], becomes], "killed from outside")
        count.outcomes["changes"] += len(dead.said)
    return count


def live(say, folder, blocks, seed):
    """Change a store until killed."""
    dice = random.Random(seed)
    store = opened(folder, blocks)
    while True:
        step(say, store, dice, deletes=True)
