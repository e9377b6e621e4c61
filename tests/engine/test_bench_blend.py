"""The blend benchmark still runs and says what it promises, on a toy model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_blend.py"
POLICIES = {"reposition", "boundary", "deviation", "union"}


@pytest.mark.slow
def test_the_blend_benchmark_ends_with_one_json_line() -> None:
    run = [sys.executable, SCRIPT, "--json", "--tiny", "--rounds", "1"]
    run += ["--chunks", "3", "--tokens", "64"]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    numbers = json.loads(out.splitlines()[-1])
    assert set(numbers) == {"host", "cold", "charged", "baseline_s", "baseline"}
    for column in ("host", "cold", "charged"):
        assert set(numbers[column]) == POLICIES
    assert all(x > 0 for column in ("host", "cold") for x in numbers[column].values())
    assert numbers["charged"]["reposition"] == 0
    assert numbers["baseline"] in ("headrace", "transformers")
