"""The prefill benchmark still runs and says what it promises, on a toy model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_prefill.py"


@pytest.mark.slow
def test_the_prefill_benchmark_ends_with_one_json_line() -> None:
    run = [sys.executable, SCRIPT, "--json", "--tiny", "--lengths", "2048", "--rounds", "2"]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    numbers = json.loads(out.splitlines()[-1])
    assert set(numbers) == {"speedup_2k"}
    assert numbers["speedup_2k"] > 0
