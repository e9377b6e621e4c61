"""A child that reads and writes a store of which a file is cut under it: cut.py FOLDER ROUNDS SEED.

The files are LMDB's and the one of all KV, by turns. After a cut of the second one what is put is
there again. Prints as JSON how its children ended: 0 is well, 1 is wrong KV, 2 is an error of a
read, 3 is a store that works no more, -7 is SIGBUS.
"""

import json
import os
import random
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from kvstore.errors import StoreError
from tests.kvstore.crash import MODEL, forked, keys_of, opened
from tests.kvstore.make import items, right

CHAINS = 8
FILES = ("data.mdb", "values-*")


def work(folder, file, dice):
    store = opened(folder, 100 * CHAINS)
    chains = [keys_of(number) for number in range(CHAINS)]
    for keys in chains:
        store.put(items(keys, MODEL))
    store.flush()
    [data] = Path(folder).glob(file)
    blocks, size, started = items(chains[0], MODEL), data.stat().st_size, threading.Event()
    wrong = []

    def read():
        try:
            for keys in [*chains, *chains]:
                found = [(key, store.get(key)) for key in keys]
                wrong.extend(k for k, block in found if block and not right(block, k, MODEL))
                started.set()
        finally:
            started.set()

    pool = ThreadPoolExecutor(2)
    readers = [pool.submit(read) for _ in range(2)]
    started.wait()
    for _ in range(dice.randrange(50)):
        store.lookup(chains[1])
    os.truncate(data, dice.randrange(size))
    with suppress(StoreError):
        store.delete(chains[2])
        store.put(blocks)
        store.flush()
    failed = [reader.exception() for reader in readers if reader.exception() is not None]
    for error in failed:
        traceback.print_exception(error)
    works = file == FILES[0] or mends(store, chains)
    with suppress(StoreError):
        store.close()
    os._exit(1 if wrong else 2 if failed else 0 if works else 3)


def mends(store, chains):
    """Whether a store without some of its KV has all blocks again that are put once more."""
    for keys in chains:
        for key in keys:
            store.get(key)  # what is not whole is a miss from now on
        store.put(items(keys, MODEL))
        store.flush()
    found = [(key, store.get(key)) for keys in chains for key in keys]
    return all(block and right(block, key, MODEL) for key, block in found) and store.audit().clean


def main(folder, rounds, seed):
    dice, ends = random.Random(seed), Counter()
    for number in range(rounds):
        here = Path(folder) / str(number)
        pid = forked(work, here, FILES[number % len(FILES)], dice)
        dice.random()
        ends[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
