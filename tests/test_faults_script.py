"""The script that runs the campaigns of faults, and the table of what they found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import faults as script  # noqa: E402  (needs the path)
from faulting.table import BAD, CAMPAIGNS, faults  # noqa: E402

from tests.kvstore.faults import run  # noqa: E402
from tests.kvstore.faults.count import Count  # noqa: E402


def test_every_campaign_is_run_by_the_script():
    assert CAMPAIGNS.keys() == run.CAMPAIGNS.keys()


def test_campaigns_are_run_counted_and_shown(tmp_path):
    names = ["clocks", "flips"]
    options = ["--scale", "0.001", "--only", *names, "--json", "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "scripts" / "faults.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    assert record["campaigns"]["flips"]["rounds"] >= 100
    assert record["campaigns"]["clocks"]["wrong"] == 0
    assert list(tmp_path.iterdir()) == []
    shown = faults(record)
    assert "the clock jumps by years | 1 | 0 | 0 | 0 | 0 |" in shown
    assert "- branch: " in shown


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_is_shown_and_fails(monkeypatch, capsys, bad):
    count = Count(rounds=3, reasons=["as it was made to"])
    assert count.is_right
    setattr(count, bad, 1)
    found = count.asdict() | {"seconds": 1.0}
    monkeypatch.setattr(script, "found_by", lambda names, *_: dict.fromkeys(names, found))
    monkeypatch.setattr(sys, "argv", ["faults", "--only", "clocks"])
    assert script.main() == 1
    said = capsys.readouterr()
    assert bad in said.out
    assert "as it was made to" in said.err
