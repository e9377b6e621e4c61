"""A disk that fails at any call costs what was not acknowledged, and a clear error."""

import pytest

from tests.kvstore.faults.run import campaign


def test_a_disk_that_fails_loses_nothing_acknowledged_and_works_again(tmp_path):
    found = campaign("broken_io", tmp_path, 60, seed=1)["outcomes"]
    assert found["refused, or missed"] > 20
    assert len([name for name in found if name.startswith("change, ")]) == 14
    assert len([name for name in found if name.startswith("squeeze, ")]) == 14
    assert len([name for name in found if name.startswith("read, ")]) == 2


@pytest.mark.slow
def test_a_disk_that_fails_a_thousand_times_loses_nothing_acknowledged(tmp_path):
    found = campaign("broken_io", tmp_path, 1500, seed=2)
    assert found["outcomes"]["works again"] > 800
