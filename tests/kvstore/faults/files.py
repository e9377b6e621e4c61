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

ROOMY, TIGHT = 1000, 15  # blocks that a store has room for


def cuts(folder, rounds, seed):
    count = Count(rounds)
    for number in range(rounds):
        file = cut.FILES[number % len(cut.FILES)]
        child = ended(cut_one, folder / str(number), file, seed + number)
        count.ended(child)
        count.outcomes[file] += 1
    return count


def cut_one(_say, folder, file, seed):
    cut.work(folder, file, random.Random(seed))


def power_cuts(folder, images, seed):
    """So many images of an honest disk, and of one that lies about what it keeps.

    Half of them of a store that has room for all, half of one whose pages are used again.
    """
    count, code = Count(2 * images), str(compiled(folder, unsynced.SOURCE))
    for blocks, share in ((ROOMY, images - images // 2), (TIGHT, images // 2)):
        here, log = folder / str(blocks), folder / f"log-{blocks}"
        log.touch()
        here.mkdir()
        script("write", folder / f"store-{blocks}", blocks, LD_PRELOAD=code, WRITE_LOG=str(log))
        seen = json.loads(script("replay", log, here, blocks, share, seed))
        tally(count, "honest", seen["honest"], [unsynced.RIGHT])
        tally(count, "lying", seen["lying"], [unsynced.RIGHT, unsynced.REFUSED])
    return count


def tally(count, disk, seen, allowed):
    for code, times in seen.items():
        count.outcomes[f"{disk}: {NAMES.get(int(code), code)}"] += times
        count.wrong += times * (int(code) == unsynced.WRONG)
        count.lost += times * (int(code) == unsynced.LOST)
        if int(code) not in allowed:
            count.fail(f"{times} images of a disk that is {disk} ended with {code}")


NAMES = {
    unsynced.RIGHT: "right", unsynced.REFUSED: "refused", unsynced.WRONG: "wrong",
    unsynced.LOST: "lost", unsynced.UNSOUND: "unsound", -signal.SIGSEGV: "SIGSEGV",
}  # fmt: skip


def script(*args, **env):
    command = [sys.executable, "-m", "tests.kvstore.unsynced", *map(str, args)]
    done = subprocess.run(
        command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout
