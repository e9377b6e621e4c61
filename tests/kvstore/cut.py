"""A child that reads and writes a store whose file is cut under it: cut.py FOLDER ROUNDS SEED.

Prints as JSON how its children ended: 0 is well, 1 is wrong KV, -7 is SIGBUS.
"""

import json
import os
import random
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from kvstore.errors import StoreError
from tests.kvstore.crash import MODEL, forked, keys_of, opened
from tests.kvstore.make import items, right

CHAINS = 8


def work(folder, dice):
    store = opened(folder, 100 * CHAINS)
    chains = [keys_of(number) for number in range(CHAINS)]
    for keys in chains:
        store.put(items(keys, MODEL))
    store.flush()
    data = Path(folder) / "data.mdb"
    blocks, size, started = items(chains[0], MODEL), data.stat().st_size, threading.Event()
    wrong = []

    def read():
        for _ in range(2):
            for keys in chains:
                found = [(key, store.get(key)) for key in keys]
                wrong.extend(k for k, block in found if block and not right(block, k, MODEL))
                started.set()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    started.wait()
    for _ in range(dice.randrange(50)):
        store.lookup(chains[1])
    os.truncate(data, dice.randrange(size))
    with suppress(StoreError):
        store.delete(chains[2])
        store.put(blocks)
        store.flush()
    for reader in readers:
        reader.join()
    with suppress(StoreError):
        store.close()
    os._exit(1 if wrong else 0)


def main(folder, rounds, seed):
    dice, ends = random.Random(seed), Counter()
    for number in range(rounds):
        here = Path(folder) / str(number)
        pid = forked(work, here, dice)
        dice.random()
        ends[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
