"""Child processes that write to a store and are killed. Run as a script by test_kill.

The parent imports torch once and forks; it never opens a store itself, so a round takes
milliseconds. Usage: crash.py FOLDER ROUNDS SEED; prints one JSON line.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from tests.kvstore.make import chain, content, identity, items, right

MODEL = identity(num_layers=2, num_kv_heads=4, head_dim=64)
BLOCKS = 6  # per chain


def keys_of(number):
    return chain(range(1000 * number, 1000 * number + 4 * BLOCKS), model=MODEL)


def opened(folder, blocks):
    cost = entry_cost(content(keys_of(0)[0], MODEL))
    return TieredStore([DiskTier(Path(folder), blocks * cost)])


def write(folder, blocks, first, pipe):
    """Put chains for ever; say which ones are acknowledged."""
    store = opened(folder, blocks)
    for number in range(first, sys.maxsize):
        store.put(items(keys_of(number), MODEL))
        store.flush()
        os.write(pipe, f"{number}\n".encode())


def check(folder, blocks, upto, acknowledged):
    """Open what the dead writer left; everything acknowledged is there, and nothing is wrong."""
    with opened(folder, blocks) as store:
        report = store.audit()
        assert report.clean, report.problems
        for number in range(upto):
            keys = keys_of(number)
            found = store.lookup(keys)
            assert all(right(store.get(key), key, MODEL) for key in keys[:found])
            assert not any(store.get(key) for key in keys[found:])
            assert found == BLOCKS or number not in acknowledged, f"chain {number} lost"
        assert store.stats().tiers["disk"].corrupt == 0


def forked(work, *args):
    if pid := os.fork():
        return pid
    code = 1
    try:
        work(*args)
        code = 0
    finally:
        os._exit(code)


def round_of(folder, blocks, first, dice):
    """One writer's life. Returns the chains it acknowledged."""
    reader, writer = os.pipe()
    child = forked(write, folder, blocks, first, writer)
    os.close(writer)
    said = b""
    for _ in range(dice.randrange(6)):
        said += os.read(reader, 100)
    time.sleep(dice.random() * 0.02)  # the random moment is the point
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    while more := os.read(reader, 100):
        said += more
    os.close(reader)
    return [int(line) for line in said.split()]


def main(folder, rounds, seed):
    torch.set_num_threads(1)
    dice = random.Random(seed)
    acknowledged = {"large": set(), "small": set()}
    first = dict.fromkeys(acknowledged, 0)
    for turn in range(rounds):
        name = ("large", "large", "small")[turn % 3]
        blocks = 100_000 if name == "large" else 4 * BLOCKS
        said = round_of(f"{folder}/{name}", blocks, first[name], dice)
        acknowledged[name].update(said)
        first[name] = max([first[name], *(number + 1 for number in said)])
        surely = acknowledged[name] if name == "large" else set()  # the small one evicts
        upto = first[name] + 1  # one chain may be there that was not acknowledged
        pid = forked(check, f"{folder}/{name}", blocks, upto, surely)
        assert os.waitpid(pid, 0)[1] == 0, f"round {turn} on the {name} store"
    print(json.dumps({name: len(acks) for name, acks in acknowledged.items()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
