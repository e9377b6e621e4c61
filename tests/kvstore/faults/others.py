"""Processes that share a store with others, or with a clock or a folder that changes under them."""

import os
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from kvstore.disk.environment import files_of
from kvstore.errors import StoreError
from tests.kvstore.faults.children import Child, ended
from tests.kvstore.faults.count import Count
from tests.kvstore.faults.phases import fill
from tests.kvstore.faults.state import (
    BLOCKS,
    CHAINS,
    TIGHT,
    examine,
    held,
    items_of,
    keys_of,
    opened,
    tier_of,
    wrong_among,
)

YEAR_S = 365 * 86400
NOBODY = 65534
CHANGES = 20
TABLE_BYTES = 1 << 20  # most of data.mdb: what is freed beside a reader is used again
FATES = (
    "deleted", "unlinked", "values unlinked", "moved", "replaced", "cut", "values cut", "read-only",
)  # fmt: skip


def wrong_in(store):
    """Wrong blocks of all chains."""
    return sum(
        wrong_among(number, [store.get(key) for key in keys_of(number)]) for number in range(CHAINS)
    )


def put(store, number):
    store.put(items_of(number))
    store.flush()


def note(count, child, allowed=(0,)):
    """Count what a child said at its end."""
    count.rounds += 1
    if count.ended(child, allowed=allowed) and child.code == 0:
        count.wrong += child.said[-1]["wrong"]
        for problem in child.said[-1]["problems"]:
            count.fail(problem)


def reading(say, folder):
    with tier_of(opened(folder, TIGHT)).access.reading():
        say("in a transaction")
        time.sleep(1000)  # until killed


def beside_a_reader(say, folder, seed):
    """Write while another process is killed in a transaction that it reads in."""
    dice = random.Random(seed)
    reader = Child(reading, folder)
    reader.hear()
    with opened(folder, TIGHT) as store:
        for alive in (True, False):
            for _ in range(4):
                number = dice.choice([n for n, there in enumerate(held(store)) if not there])
                put(store, number)
            lag = tier_of(store).readers.lag
            problems = [] if bool(lag) == alive else [f"a lag of {lag} commits, alive: {alive}"]
            if alive:
                reader.kill()
                reader.join()
        say({"wrong": wrong_in(store), "problems": problems})


def readers_killed(folder, rounds, seed):
    """Pages of KV are used again at once, and those of the tables when the reader is dead."""
    count, store = Count(), folder / "store"
    count.ended(ended(fill, store, TIGHT))
    for number in range(rounds):
        note(count, ended(beside_a_reader, store, seed + number))
    note(count, ended(examine, store, TIGHT))  # which sees how large the values are
    size = (store / "data.mdb").stat().st_size
    if size > TABLE_BYTES:
        count.fail(f"the tables have grown to {size} bytes")
    return count


def sharing(say, folder, seed):
    """Put, delete and read in a tight store that others have open, too."""
    dice, wrong = random.Random(seed), 0
    with opened(folder, TIGHT) as store:
        for _ in range(CHANGES):
            number = dice.randrange(CHAINS)
            if dice.random() < 0.2:
                store.delete(keys_of(number)[dice.randrange(BLOCKS) :][:1])
            else:
                put(store, number)
            wrong += wrong_among(number, [store.get(key) for key in keys_of(number)])
        say({"wrong": wrong, "problems": damaged(store)})


def damaged(store):
    """Blocks that went while they were read are none of these."""
    corrupt = tier_of(store).corrupt
    return [f"{corrupt} blocks were taken for damaged"] if corrupt else []


def two_writers(folder, rounds, seed):
    """Two processes at a time, in each third round of which one is killed."""
    count, dice, store = Count(), random.Random(seed), folder / "store"
    for number in range(rounds):
        writers = [Child(sharing, store, dice.randrange(1 << 30)) for _ in range(2)]
        if number % 3 == 0:
            time.sleep(0.02 + dice.random() * 0.1)  # the random moment is the point
            writers[0].kill()
        note(count, writers[0].join(), allowed=(0, -9))
        note(count, writers[1].join())
        found = ended(examine, store, TIGHT)
        note(count, found)
        count.rounds -= 2
    count.outcomes["changes"] = 2 * rounds * CHANGES
    return count


def jumping(say, folder, seed):
    """Use a store while the clock jumps by years; says what does not follow the order of use."""
    dice, wall, wall_ns, offset = random.Random(seed), time.time, time.time_ns, 0
    time.time = lambda: wall() + offset
    time.time_ns = lambda: wall_ns() + offset * 10**9
    problems, used = [], []
    with opened(folder, TIGHT) as store:
        pin, pinned = store.pin(keys_of(0)), 0
        for number in [0, *(dice.randrange(CHAINS) for _ in range(CHANGES))]:
            offset = dice.randrange(-40, 40) * YEAR_S
            there = held(store)
            store.lookup(keys_of(number)) if there[number] else put(store, number)
            used = [n for n in used if n != number] + [number]
            kept = [pinned, *[n for n in used if n != pinned][-TIGHT // BLOCKS + 1 :]]
            problems += [f"{n} is gone" for n in kept if held(store)[n] < BLOCKS]
            if min(store.ages()) < 0 or len(store._pins) != BLOCKS or store._pins.expired:
                problems.append(f"ages {store.ages()}, pins {len(store._pins)}")
        pin.release()
        say({"wrong": wrong_in(store), "problems": problems})


def clocks(folder, rounds, seed):
    count, store = Count(), folder / "store"
    for number in range(rounds):
        shutil.rmtree(store, ignore_errors=True)
        note(count, ended(jumping, store, seed + number))
        note(count, ended(examine, store, TIGHT))
        count.rounds -= 1
    return count


def suffer(fate, folder):
    """Something happens to the folder of a store."""
    data, values = files_of(folder)
    if fate == "deleted":
        shutil.rmtree(folder)
    elif fate.endswith("unlinked"):
        (values if fate.startswith("values") else data).unlink()
    elif fate == "moved":
        folder.rename(folder.with_name("elsewhere"))
    elif fate == "replaced":
        folder.rename(folder.with_name("elsewhere"))
        folder.mkdir()
    elif fate.endswith("cut"):
        file = values if fate.startswith("values") else data
        os.truncate(file, file.stat().st_size // 2)
    else:
        data.chmod(0o400)
        values.chmod(0o400)
        folder.chmod(0o500)


def bereaved(say, folder, fate, seed):
    """Read and write while the folder suffers its fate, and afterwards."""
    dice, wrong, over = random.Random(seed), [0], threading.Event()
    store = opened(folder, TIGHT)

    def read():
        while not over.is_set():
            wrong[0] += wrong_in(store)

    pool = ThreadPoolExecutor(1)
    reader = pool.submit(read)
    for turn in range(CHANGES):
        if turn == CHANGES // 2:
            time.sleep(dice.random() * 0.01)  # the random moment is the point
            suffer(fate, folder)
        with suppress(StoreError):
            store.delete(keys_of(turn % CHAINS)) if turn % 3 else put(store, turn % CHAINS)
    over.set()
    error = reader.exception()
    with suppress(StoreError):
        store.close()
    say({"wrong": wrong[0], "problems": [] if error is None else [f"a reader: {error!r}"]})


def as_nobody(say, work, *args):
    """Without a superuser's rights."""
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    work(say, *args)


def reopened(say, folder, repair):
    """What is left, maybe without what is damaged, or why that cannot be opened."""
    try:
        with opened(folder, TIGHT) as store:
            wrong = wrong_in(store)
            if repair:
                store.audit(repair=True)
            say({"wrong": wrong, "problems": store.audit().problems, "error": ""})
    except StoreError as error:
        say({"wrong": 0, "problems": [], "error": type(error).__name__})


def removed(_folder, rounds, seed):
    """In folders of their own, which others than a superuser reach."""
    count = Count()
    for number in range(rounds):
        fate = FATES[number % len(FATES)]
        with tempfile.TemporaryDirectory(prefix="headrace-faults-") as made:
            if os.geteuid() == 0:
                os.chown(made, NOBODY, NOBODY)
            store = Path(made) / "store"
            count.ended(ended(as_nobody, fill, store, TIGHT))
            note(count, ended(as_nobody, bereaved, store, fate, seed + number))
            left = ended(as_nobody, reopened, store, fate == "values cut")
            note(count, left)
            count.rounds -= 1
            count.outcomes[f"{fate}: then {left.said[-1]['error'] or 'opens'}"] += 1
    return count
