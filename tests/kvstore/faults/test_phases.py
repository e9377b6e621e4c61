"""A process that is killed in any phase leaves what it acknowledged, whole, and nothing else."""

import pytest

from tests.kvstore.faults.phases import PHASES
from tests.kvstore.faults.run import campaign


def test_a_process_killed_in_any_phase_loses_nothing_acknowledged(tmp_path):
    found = campaign("kill_phases", tmp_path, 1, seed=1)
    assert found["outcomes"] == dict.fromkeys(PHASES, 1)


def test_a_process_killed_from_outside_leaves_each_change_whole_or_not_at_all(tmp_path):
    found = campaign("kill_outside", tmp_path, 6, seed=1)
    assert found["outcomes"]["changes"] > 6


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_processes_killed_in_every_phase_lose_nothing_acknowledged(tmp_path):
    found = campaign("kill_phases", tmp_path, 100, seed=2)
    assert found["outcomes"] == dict.fromkeys(PHASES, 100)


@pytest.mark.slow
def test_hundreds_of_processes_killed_from_outside_lose_nothing_acknowledged(tmp_path):
    assert campaign("kill_outside", tmp_path, 400, seed=3)["rounds"] == 400
