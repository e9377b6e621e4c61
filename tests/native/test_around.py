"""Copies around the caches are copies, wherever they begin and end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from native import around
from native.around import LEAST_BYTES, copy_around

MARGIN = 128


@pytest.mark.parametrize("compiled", [True, False])
@given(
    to=st.integers(0, MARGIN),
    start=st.integers(0, MARGIN),
    nbytes=st.integers(0, 1100) | st.integers(LEAST_BYTES - 2, LEAST_BYTES + 1100),
)
def test_what_arrives_is_what_was_there_and_nothing_else_changes(compiled, to, start, nbytes):
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + MARGIN, np.uint8)
    out = np.full(nbytes + 2 * MARGIN, 7, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        if compiled:
            patch.setattr(around, "LEAST_BYTES", 0)
        else:
            patch.setattr(around, "library", lambda source: None)
        copy_around(out[to : to + nbytes], data[start : start + nbytes])
    assert np.array_equal(out[to : to + nbytes], data[start : start + nbytes])
    assert (out[:to] == 7).all()
    assert (out[to + nbytes :] == 7).all()


def test_other_sizes_and_bytes_that_lie_apart_are_refused():
    out, data = np.zeros(64, np.uint8), np.ones(64, np.uint8)
    for wrong in (data[:63], data[::2]):
        with pytest.raises(ValueError, match="as many bytes in a row"):
            copy_around(out, wrong)
    with pytest.raises(ValueError, match="as many bytes in a row"):
        copy_around(out[::2], data[:32])
    assert not out.any()
