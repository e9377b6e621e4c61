"""What all tests of the engine have."""

import math

import pytest

from engine import breakeven


@pytest.fixture(autouse=True, scope="module")
def loaded(request):
    """What is stored is loaded, however slow a busy machine makes that seem."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_breakeven":
            patch.setattr(breakeven, "LEAST_S", math.inf)
        yield
