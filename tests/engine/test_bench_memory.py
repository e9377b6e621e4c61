"""The benchmark of memory measures each of its methods."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_memory.py"


def device_bytes(case: str) -> int:
    run = [sys.executable, str(SCRIPT), "--alone", case, "--tokens", "4096"]
    out = subprocess.run(run, check=True, capture_output=True, text=True, timeout=300).stdout
    found = json.loads(out)
    assert found["kv_bytes"] == 4096 * 2 * 2 * 8 * 128 * 2
    return int(found["device_bytes"])


def test_an_estimate_of_the_tail_takes_what_it_is_said_to():
    tail = device_bytes("headrace") - device_bytes("headrace, no tail")
    clusters = 4096 / 128
    assert 0.9 < tail / (2 * 8 * clusters * (8 * 128 + 4)) < 1.8  # and room to grow
