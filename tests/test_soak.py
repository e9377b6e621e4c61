"""What scripts/soak calls flat."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from soaking.table import soak  # noqa: E402  (needs the path)
from soaking.watch import Window, verdict  # noqa: E402

BUDGET = 1 << 30


def windows(**last):
    """Six that are alike, but for the last third."""
    first = {"reads": 9, "p50_s": 1e-3, "p99_s": 2e-3, "file_bytes": BUDGET, "resident_bytes": 1000}
    return [Window(**first)] * 4 + [Window(**(first | last))] * 2


def test_what_stays_as_it_is_is_flat():
    assert verdict(windows(), BUDGET, 0) == []
    assert verdict(windows(resident_bytes=1020, p50_s=1.2e-3), BUDGET, 0) == []


@pytest.mark.parametrize(
    ("last", "wrong", "said"),
    [
        ({"file_bytes": int(1.06 * BUDGET)}, 0, "1.060 of the budget"),
        ({"resident_bytes": 1030}, 0, "memory grew by 3.0%"),
        ({"p50_s": 1.3e-3}, 0, "1.30 times as slow"),
        ({}, 2, "2 blocks were not what was written"),
    ],
)
def test_what_grows_is_told(last, wrong, said):
    [line] = verdict(windows(**last), BUDGET, wrong)
    assert said in line


def test_a_run_that_is_too_short_is_no_proof():
    assert "too few" in verdict(windows()[:2], BUDGET, 0)[0]


def test_thirds_stand_beside_each_other_in_the_table():
    record = {"budget_bytes": BUDGET, "minutes": 1.0, "blocks_read": 5000, "blocks_put": 4}
    record |= {"evictions": 3, "wrong": ["memory grew by 3.0%"]}
    record["windows"] = [w._asdict() for w in windows(p50_s=7e-3, file_bytes=2 * BUDGET)]
    shown = soak(record)
    assert "| first | 1.000 | 0 | 1.00 | 2.00 |" in shown
    assert "| last | 2.000 | 0 | 7.00 | 2.00 |" in shown
    assert "5,000 blocks" in shown
    assert "- memory grew by 3.0%" in shown


@pytest.mark.slow
def test_a_short_soak_reads_what_was_written(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--minutes", "0.2", "--window"]
    command += ["2", "--disk-gib", "0.25", "--folder", str(tmp_path), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    found = json.loads(ran.stdout)
    assert found["blocks_read"] > 0 < found["evictions"]
    assert not [line for line in found["wrong"] if "memory" not in line and "file" not in line]
