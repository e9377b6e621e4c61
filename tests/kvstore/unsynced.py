"""What a power cut may leave of a store: made from a log of every write and sync of data.mdb.

    unsynced.py write FOLDER BLOCKS           run with write_log.c loaded; acknowledges in its log
    unsynced.py replay LOG FOLDER BLOCKS IMAGES SEED

An honest disk keeps what was synced, and any part of what was not, in sectors of 512 bytes. A lying
one loses any pages, synced or not. Prints one JSON line.
"""

import json
import os
import random
import struct
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch

from kvstore.errors import StoreError
from tests.kvstore.crash import BLOCKS, MODEL, forked, keys_of, opened
from tests.kvstore.make import items, right

SOURCE = Path(__file__).with_name("write_log.c")
SECTOR, PAGE = 512, 4096
CHAINS = 10
RIGHT, REFUSED, WRONG, LOST = range(4)
_HEAD = struct.Struct("<cQQ")


def write(folder, blocks):
    log = os.open(os.environ["WRITE_LOG"], os.O_WRONLY | os.O_APPEND)
    store = opened(folder, blocks)
    os.write(log, _HEAD.pack(b"O", 0, 0))
    for number in range(CHAINS):
        store.put(items(keys_of(number), MODEL))
        store.flush()
        os.write(log, _HEAD.pack(b"A", number, 0))
    store.close()


def read_log(path):
    data, at, log = path.read_bytes(), 0, []
    while at < len(data):
        op, offset, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        log.append((op, offset, data[at : at + length]))
        at += length
    return log


def apply(image, offset, data):
    image.extend(bytes(max(0, offset + len(data) - len(image))))
    image[offset : offset + len(data)] = data


def pieces(offset, data, size):
    """A write, cut at the borders of sectors or pages."""
    end = offset + len(data)
    cuts = [offset, *range(offset // size * size + size, end, size), end]
    return [(a, data[a - offset : b - offset]) for a, b in pairwise(cuts)]


def honest(log, at, dice):
    """The file after a power cut in the middle of operation `at`; what was acknowledged."""
    image, pending, acknowledged = bytearray(), [], []
    for op, offset, data in log[:at]:
        if op in (b"W", b"D"):
            pending += pieces(offset, data, SECTOR)
        if op == b"A":
            acknowledged.append(offset)
        if op in (b"S", b"D"):
            for piece in pending:
                apply(image, *piece)
            pending = []
    if at < len(log) and log[at][0] in (b"W", b"D"):
        pending += pieces(*log[at][1:], SECTOR)
    chance = dice.choice([0, 0.5, 0.9, 1])
    for piece in pending:
        if dice.random() < chance:
            apply(image, *piece)
    return image, acknowledged


def lying(log, at, dice):
    """The file of a disk that lost some pages of the last few commits, whatever it said."""
    image = bytearray()
    recent = max(0, at - dice.randrange(1, 40))
    chance = dice.choice([0.02, 0.2, 0.5])
    for i, (op, offset, data) in enumerate(log[:at]):
        if op not in (b"W", b"D"):
            continue
        for piece in pieces(offset, data, PAGE):
            keep = i < recent or piece[0] < 2 * PAGE or dice.random() >= chance
            apply(image, *(piece if keep else (piece[0] + len(piece[1]), b"")))
    return image, []


def check(folder, blocks, acknowledged):
    """Exit with what opening and reading everything came to."""
    result = RIGHT
    try:
        store = opened(folder, blocks)
    except StoreError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(REFUSED)
    for number in range(CHAINS):
        keys = keys_of(number)
        for key in keys:
            block = store.get(key)
            if block is not None and not right(block, key, MODEL):
                result = WRONG
        if number in acknowledged and store.lookup(keys) < BLOCKS:
            result = LOST
    os._exit(result)


def replay(log_path, folder, blocks, images, seed):
    dice, log = random.Random(seed), read_log(Path(log_path))
    created = next(i for i, (op, *_) in enumerate(log) if op == b"O")  # before, there is no file
    seen = {}
    for crash in (honest, lying):
        outcomes = Counter()
        for i in range(images):
            image, acknowledged = crash(log, dice.randrange(created, len(log) + 1), dice)
            here = Path(folder) / f"{crash.__name__}{i}"
            here.mkdir()
            (here / "data.mdb").write_bytes(image)
            kept = acknowledged if blocks > CHAINS * BLOCKS else []  # else they were evicted
            pid = forked(check, here, blocks, kept)
            outcomes[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
            for file in here.iterdir():
                file.unlink()
        seen[crash.__name__] = outcomes
    print(json.dumps(seen | {"operations": len(log), "syncs": sum(op[0] == b"S" for op in log)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, *rest = sys.argv[1:]
    if verb == "write":
        write(rest[0], int(rest[1]))
    else:
        replay(rest[0], rest[1], *map(int, rest[2:]))
