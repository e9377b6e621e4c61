"""Real data that is not part of the project, found through $HEADRACE_DATA."""

import os
from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    """A file under $HEADRACE_DATA; skips the test, saying why, where it is not set."""
    folder = os.environ.get("HEADRACE_DATA")
    if not folder:
        pytest.skip("HEADRACE_DATA is not set: see README, Real data")
    path = Path(folder) / name
    assert path.exists(), f"HEADRACE_DATA is {folder}, which has no {name}"
    return path
