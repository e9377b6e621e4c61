"""Campaigns: run.py NAME,NAME.. FOLDER ROUNDS SEED; prints what came of each as a JSON line."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.kvstore.faults import broken_io, files, flips, others, overtaken, phases, remote
from tests.kvstore.faults.state import warm

ROOT = Path(__file__).parents[3]
MODULE = "tests.kvstore.faults.run"
CAMPAIGNS = {
    "kill_phases": phases.in_every_phase,
    "kill_outside": phases.from_outside,
    "flips": flips.flip,
    "broken_io": broken_io.broken,
    "readers_killed": others.readers_killed,
    "two_writers": others.two_writers,
    "overtaken": overtaken.overtaken,
    "clocks": others.clocks,
    "removed": others.removed,
    "cuts": files.cuts,
    "power_cuts": files.power_cuts,
    "remote_kill": remote.senders_killed,
    "remote_tampering": remote.tampered,
}


def found_by(names, folder, rounds, seed):
    """What campaigns found, by name, in a process of its own that has no threads."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if "broken_io" in names:
        env["LD_PRELOAD"] = str(broken_io.compiled(Path(folder)))
    command = [sys.executable, "-m", MODULE, ",".join(names), str(folder), str(rounds), str(seed)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
    print(done.stderr, file=sys.stderr, end="")
    return found


def campaigns(names, folder, rounds, seed):
    """What each found; an AssertionError where that is not right."""
    found = found_by(names, folder, rounds, seed)
    for name, each in found.items():
        assert each["is_right"], (name, each)
    return found


def campaign(name, folder, rounds, seed):
    return campaigns([name], folder, rounds, seed)[name]


def main(names, folder, rounds, seed):
    torch.set_num_threads(1)
    logging.disable()
    warm()
    for name in names.split(","):
        (Path(folder) / name).mkdir(exist_ok=True)
        began, count = time.monotonic(), CAMPAIGNS[name](Path(folder) / name, rounds, seed)
        print(json.dumps(count.asdict() | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
