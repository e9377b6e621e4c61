"""A process that is killed while it sends leaves whole blocks, and things that nobody sees."""

import json
import os
import subprocess
import sys

import pytest


def kill(server, rounds, seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kvstore.remote.crash", server.url, str(rounds), str(seed)],
        env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_killed_writer_leaves_only_whole_blocks(server):
    seen = kill(server, rounds=8, seed=1)
    assert 0 < seen["whole"] < seen["chains"]  # some were cut off, or the moments are wrong
    with server.client() as client:
        assert all(client.ttl(name) > 0 for name in client.scan_iter())  # what is left goes


@pytest.mark.slow
def test_a_hundred_killed_writers_leave_only_whole_blocks(server):
    seen = kill(server, rounds=100, seed=2)
    assert 0 < seen["whole"] < seen["chains"]
