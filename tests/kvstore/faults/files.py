"""Files that are cut under a process, and what power cuts leave of one."""

import json
import os
import random
import signal
import subprocess
import sys

from tests.kvstore import cut, unsynced
from tests.kvstore.faults.broken_io import compiled
from tests.kvstore.faults.children import ended
from tests.kvstore.faults.count import Count

BLOCKS = 1000  # room for all


def cuts(folder, rounds, seed):
    count = Count(rounds)
    for number in range(rounds):
        child = ended(cut_one, folder / str(number), seed + number)
        count.ended(child)
    return count


def cut_one(_say, folder, seed):
    cut.work(folder, random.Random(seed))


def power_cuts(folder, images, seed):
    """So many images of an honest disk, and of one that lies about what it keeps."""
    count, log = Count(2 * images), folder / "log"
    log.touch()
    loaded = {"LD_PRELOAD": str(compiled(folder, unsynced.SOURCE)), "WRITE_LOG": str(log)}
    script("write", folder / "store", BLOCKS, **loaded)
    (folder / "images").mkdir()
    seen = json.loads(script("replay", log, folder / "images", BLOCKS, images, seed))
    for disk, allowed in (
        ("honest", [unsynced.RIGHT]),
        ("lying", [unsynced.RIGHT, unsynced.REFUSED]),
    ):
        for code, times in seen[disk].items():
            count.outcomes[f"{disk}: {NAMES.get(int(code), code)}"] += times
            count.wrong += times * (int(code) == unsynced.WRONG)
            count.lost += times * (int(code) == unsynced.LOST)
            if int(code) not in allowed:
                count.fail(f"{times} images of a disk that is {disk} ended with {code}")
    return count


NAMES = {
    unsynced.RIGHT: "right", unsynced.REFUSED: "refused", unsynced.WRONG: "wrong",
    unsynced.LOST: "lost", -signal.SIGSEGV: "SIGSEGV",
}  # fmt: skip


def script(*args, **env):
    command = [sys.executable, "-m", "tests.kvstore.unsynced", *map(str, args)]
    done = subprocess.run(
        command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout
