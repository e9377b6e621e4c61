"""A writer that is killed at a random moment loses nothing that it acknowledged."""

import json
import os
import subprocess
import sys

import pytest


def kill(folder, rounds, seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kvstore.crash", str(folder), str(rounds), str(seed)],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_killed_writer_loses_nothing_acknowledged_and_leaves_nothing_torn(tmp_path):
    acknowledged = kill(tmp_path, rounds=36, seed=1)
    assert acknowledged["large"] > 24
    assert acknowledged["small"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_killed_writers_lose_nothing(tmp_path, seed):
    kill(tmp_path, rounds=150, seed=seed)
