"""The decode benchmark still runs and says what it promises, on a toy model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_decode.py"


@pytest.mark.slow
def test_the_decode_benchmark_ends_with_one_json_line() -> None:
    run = [sys.executable, SCRIPT, "--json", "--tiny", "--quick", "--device", "cpu"]
    run += ["--lengths", "2048", "--rounds", "2"]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    numbers = json.loads(out.splitlines()[-1])
    assert set(numbers) == {"speedup_2k", "memory_ratio_2k"}
    assert all(x > 0 for x in numbers.values())
