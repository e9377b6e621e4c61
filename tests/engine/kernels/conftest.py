"""What tests of compiled kernels need."""

import pytest

from engine.kernels.attend_token import SOURCE
from native import library as native


@pytest.fixture
def compiled():
    if native.library(SOURCE) is None:
        pytest.skip("no C compiler on this machine")
