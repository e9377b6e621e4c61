"""One campaign: run.py NAME FOLDER ROUNDS SEED; prints what came of it as one JSON line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.kvstore.faults import broken_io, flips, phases
from tests.kvstore.faults.state import warm

ROOT = Path(__file__).parents[3]
CAMPAIGNS = {
    "kill_phases": phases.in_every_phase,
    "kill_outside": phases.from_outside,
    "flips": flips.flip,
    "broken_io": broken_io.broken,
}


def found_by(name, folder, rounds, seed, **env):
    """What a campaign found, in a process of its own that has no threads."""
    if name == "broken_io":
        env["LD_PRELOAD"] = str(broken_io.library(Path(folder)))
    done = subprocess.run(
        [sys.executable, "-m", __name__, name, str(folder), str(rounds), str(seed)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def campaign(name, folder, rounds, seed, **env):
    """What it found; an AssertionError where that is not right."""
    found = found_by(name, folder, rounds, seed, **env)
    assert found["is_right"], (found, found["stderr"][-3000:])
    return found


def main(name, folder, rounds, seed):
    torch.set_num_threads(1)
    logging.disable()
    warm()
    print(json.dumps(CAMPAIGNS[name](Path(folder), rounds, seed).asdict()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
