"""Settings every test runs under."""

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import settings

# time says nothing on a busy machine
settings.register_profile("headrace", deadline=None, max_examples=40)
settings.register_profile("thorough", deadline=None, max_examples=200)  # scripts/test --slow
settings.load_profile("headrace")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for a GPU need one, or a pretended one (`tests.pretended`)."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")


def mend_interpreter() -> None:
    """Have Triton 3.6 interpret `range` of a number that is no constant, with NumPy 2.4 and newer.

    It keeps numbers as arrays of one element, which NumPy converts no more; Triton 3.7 knows.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from tests import sanitizer

    mend_interpreter()
    sanitizer.install()
