"""What scripts/soak calls flat."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from soaking.churn import Churn  # noqa: E402  (needs the path)
from soaking.table import soak  # noqa: E402
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


class Reads:
    """A store that says it has every block, and reads each as `read` makes it from what was put."""

    def __init__(self, read):
        self.read, self.stop, self.there = read, threading.Event(), {}

    @contextmanager
    def pin(self, keys):
        yield

    def lookup(self, keys):
        return sum(key.digest in self.there for key in keys)

    def put(self, items):
        self.there |= {key.digest: block.data.clone() for key, block in items}

    def read_many(self, keys, layers, out):
        out.copy_(torch.stack([self.read(self.there[key.digest]) for key in keys]))
        self.stop.set()
        return [True] * len(keys)


def one_number_else(block):
    block = block.clone()
    block.view(torch.int16).view(-1)[-1] += 1
    return block


@pytest.mark.parametrize(
    ("read", "share"),
    [(torch.clone, 0), (one_number_else, 1), (lambda block: block.roll(1, -1), 1)],
)
def test_what_is_not_what_was_put_is_counted(read, share):
    store = Reads(read)
    churn = Churn(store, seed=0)
    churn.run(store.stop, rate=1e9, number=0)
    churn.raise_failure()
    assert churn.wrong == share * churn.blocks_read
    assert churn.blocks_read > 0


@pytest.mark.slow
def test_a_short_soak_reads_what_was_written(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--minutes", "0.2", "--window"]
    command += ["2", "--disk-gib", "0.25", "--folder", str(tmp_path), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    found = json.loads(ran.stdout)
    assert found["blocks_read"] > 0 < found["evictions"]
    assert not [line for line in found["wrong"] if "memory" not in line and "file" not in line]
