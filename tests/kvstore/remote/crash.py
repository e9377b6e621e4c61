"""Child processes that send blocks to a server and are killed. Run as a script by test_kill.

The parent imports torch once and forks, so a round takes milliseconds.
Usage: crash.py URL ROUNDS SEED; prints one JSON line.
"""

import json
import os
import random
import signal
import sys
import time

import torch

from kvstore.remote.config import RemoteConfig
from kvstore.remote.tier import RemoteTier
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, identity, items, right
from tests.kvstore.remote.server import SECRET

MODEL = identity(num_layers=6, num_kv_heads=8, head_dim=1024)  # 768 KiB, in one record
WIDE = identity(num_layers=6, num_kv_heads=16, head_dim=2048)  # 3 MiB, in two
BLOCKS = 4  # per chain


def keys_of(number, model):
    start = 1000 * number
    return chain(range(start, start + 4 * BLOCKS), model=model)


def opened(url):
    config = RemoteConfig(url=url, timeout_s=10.0, connect_timeout_s=10.0)
    return TieredStore([HostTier(1 << 28)], remote=RemoteTier(config, secret=SECRET))


def write(url, first, pipe):
    """Put chains for ever; say when it begins with each."""
    store = opened(url)
    for number in range(first, sys.maxsize):
        for model in (MODEL, WIDE):
            store.put(items(keys_of(number, model), model))
        os.write(pipe, b".")
        store._remote.drain(10.0)


def check(url, upto):
    """What others see of the dead writer's blocks: whole ones, all of whose numbers are right."""
    found = []
    with opened(url) as store:
        for number in range(upto):
            for model in (MODEL, WIDE):
                keys = keys_of(number, model)
                there = store.lookup(keys)
                assert all(right(store.get(key), key, model) for key in keys[:there])
                found.append(there)
        stats = store.stats()
        assert stats.tiers["remote"].corrupt == stats.tiers["remote"].quarantined == 0
        assert stats.remote.failures == 0
    return found


def round_of(url, first, dice):
    """One writer's life; how many chains it began."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            write(url, first, writer)
        finally:
            os._exit(1)
    os.close(writer)
    begun = sum(len(os.read(reader, 1)) for _ in range(dice.randrange(1, 4)))
    time.sleep(dice.random() * 0.03)  # the random moment is the point
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    while more := os.read(reader, 100):
        begun += len(more)
    os.close(reader)
    return begun


def campaign(url, rounds, seed):
    """How many chains were begun, and what is there of them. AssertionError if that is wrong."""
    dice, first = random.Random(seed), 0
    for _ in range(rounds):
        first += round_of(url, first, dice)
    found = check(url, first)
    return {"chains": len(found), "whole": found.count(BLOCKS), "blocks": sum(found)}


def main(url, rounds, seed):
    torch.set_num_threads(1)
    print(json.dumps(campaign(url, rounds, seed)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
