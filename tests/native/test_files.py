"""How many files a process may have open."""

import subprocess
import sys

import pytest

SAYS = (
    "import resource, sys\n"
    "from native.files import room_for\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))\n"
    "print(room_for(int(sys.argv[3])), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "told", "after"),
    [(50, 90, 70, 70, 70), (50, 90, 200, 90, 90), (50, 90, 20, 20, 50), (90, 90, 91, 90, 90)],
)
def test_the_soft_limit_is_raised_as_far_as_is_needed_and_allowed(soft, hard, wanted, told, after):
    command = [sys.executable, "-c", SAYS, *map(str, (soft, hard, wanted))]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(told), str(after)]
