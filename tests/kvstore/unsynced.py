"""What a power cut may leave of a store: made from a log of all writes and syncs of its files.

    unsynced.py write FOLDER BLOCKS           run with write_log.c loaded; acknowledges in its log
    unsynced.py replay LOG FOLDER BLOCKS IMAGES SEED

An honest disk keeps what was synced, each file for itself, and of both files any part of what was
not, in sectors of 512 bytes: what is there then is sound. A lying one loses any pages, synced or
not. Prints one JSON line.
"""

import json
import os
import random
import struct
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from kvstore.errors import StoreError
from tests.kvstore.crash import BLOCKS, MODEL, forked, keys_of, opened
from tests.kvstore.make import items, right

SOURCE = Path(__file__).with_name("write_log.c")
SECTOR, PAGE = 512, 4096
CHAINS = 10
RIGHT, REFUSED, WRONG, LOST, UNSOUND = range(5)
_HEAD = struct.Struct("<c23sQQ")


class Operation(NamedTuple):
    """Of a file: W written, D written and synced, S all synced, T cut at the offset.

    Of the store: O opened, A chain `offset` acknowledged.
    """

    what: bytes
    file: str
    offset: int
    data: bytes = b""

    def pieces(self, size):
        """A change of the file, cut at the borders of sectors or pages."""
        if self.what == b"T":
            return [self]
        if self.what not in (b"W", b"D"):
            return []
        start, end = self.offset, self.offset + len(self.data)
        cuts = [start, *range(start // size * size + size, end, size), end]
        return [
            self._replace(offset=a, data=self.data[a - start : b - start])
            for a, b in pairwise(cuts)
        ]

    def apply(self, image):
        end = self.offset + len(self.data)
        image.extend(bytes(max(0, end - len(image))))
        if self.what == b"T":
            del image[self.offset :]
        image[self.offset : end] = self.data


def write(folder, blocks):
    log = os.open(os.environ["WRITE_LOG"], os.O_WRONLY | os.O_APPEND)
    store = opened(folder, blocks)
    os.write(log, _HEAD.pack(b"O", b"", 0, 0))
    for number in range(CHAINS):
        store.put(items(keys_of(number), MODEL))
        store.flush()
        os.write(log, _HEAD.pack(b"A", b"", number, 0))
    store.close()


def read_log(path):
    data, at, log = path.read_bytes(), 0, []
    while at < len(data):
        what, name, offset, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        log.append(Operation(what, name.rstrip(b"\0").decode(), offset, data[at : at + length]))
        at += length
    return log


def honest(log, at, dice):
    """The files after a power cut in the middle of operation `at`; what was acknowledged."""
    images, pending, acknowledged = defaultdict(bytearray), defaultdict(list), []
    for operation in log[:at]:
        pending[operation.file] += operation.pieces(SECTOR)
        if operation.what == b"A":
            acknowledged.append(operation.offset)
        if operation.what in (b"S", b"D"):
            for piece in pending.pop(operation.file, []):
                piece.apply(images[operation.file])
    for operation in log[at : at + 1]:
        pending[operation.file] += operation.pieces(SECTOR)
    for file, pieces in pending.items():
        chance = dice.choice([0, 0.5, 0.9, 1])
        for piece in pieces:
            if dice.random() < chance:
                piece.apply(images[file])
    return images, acknowledged


def lying(log, at, dice):
    """The files of a disk that lost some pages of the last few commits, whatever it said."""
    images = defaultdict(bytearray)
    recent = max(0, at - dice.randrange(1, 40))
    chance = dice.choice([0.02, 0.2, 0.5])
    for i, operation in enumerate(log[:at]):
        for piece in operation.pieces(PAGE):
            meta = piece.file == "data.mdb" and piece.offset < 2 * PAGE
            if i < recent or meta or dice.random() >= chance:
                piece.apply(images[piece.file])
            else:  # as long as it was, at least
                end = piece.offset + len(piece.data)
                piece._replace(offset=end, data=b"").apply(images[piece.file])
    return images, []


def check(folder, blocks, acknowledged, is_honest):
    """Exit with what opening and reading everything came to."""
    try:
        store = opened(folder, blocks)
    except StoreError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(REFUSED)
    result = RIGHT
    if is_honest and not store.audit().clean:
        result = UNSOUND
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
    created = next(i for i, op in enumerate(log) if op.what == b"O")  # before, there is no store
    files = sorted({op.file for op in log if op.file})
    seen = {}
    for crash in (honest, lying):
        outcomes = Counter()
        for i in range(images):
            image, acknowledged = crash(log, dice.randrange(created, len(log) + 1), dice)
            here = Path(folder) / f"{crash.__name__}{i}"
            here.mkdir()
            for file in files:
                (here / file).write_bytes(image[file])
            kept = acknowledged if blocks > CHAINS * BLOCKS else []  # else they were evicted
            pid = forked(check, here, blocks, kept, crash is honest)
            outcomes[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
            for file in here.iterdir():
                file.unlink()
        seen[crash.__name__] = outcomes
    syncs = Counter(op.file for op in log if op.what == b"S")
    print(json.dumps(seen | {"operations": len(log), "syncs": [syncs[file] for file in files]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, *rest = sys.argv[1:]
    if verb == "write":
        write(rest[0], int(rest[1]))
    else:
        replay(rest[0], rest[1], *map(int, rest[2:]))
