"""The benchmark of memory measures each of its methods."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_memory.py"


@pytest.fixture
def device_bytes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_memory", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)

    def measured(case: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--alone", case, "--tokens", "4096"])
        assert bench.main() == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kv_bytes"] == 4096 * 2 * 2 * 8 * 128 * 2
        return int(found["device_bytes"])

    return measured


def test_an_estimate_of_the_tail_takes_what_it_is_said_to(device_bytes):
    tail = device_bytes("headrace") - device_bytes("headrace, no tail")
    clusters = 4096 / 128
    assert 0.9 < tail / (2 * 8 * clusters * (8 * 128 + 4)) < 1.8  # and room to grow
