"""Large buffers are marked for large pages, and nothing else happens to them."""

import re
import sys
from pathlib import Path

import pytest
import torch

from native.pages import LEAST_BYTES, large_pages

SMAPS = Path("/proc/self/smaps")
THP = Path("/sys/kernel/mm/transparent_hugepage")


def marked(address: int) -> bool:
    """Whether the mapping of this address is advised to use large pages ("hg")."""
    flags = ""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line
    return " hg" in flags


def test_a_large_buffer_is_marked_and_stays_what_it_is():
    if sys.platform != "linux" or not THP.exists():
        pytest.skip("this kernel has no transparent large pages")
    buffer = torch.arange(8 * LEAST_BYTES // 8)
    assert large_pages(buffer) is buffer
    assert torch.equal(buffer, torch.arange(8 * LEAST_BYTES // 8))
    assert marked(buffer.data_ptr() + buffer.nbytes // 2)


def test_small_buffers_are_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr("native.pages.ctypes.CDLL", asked.append)
    buffer = torch.zeros(LEAST_BYTES - 1, dtype=torch.uint8)
    assert large_pages(buffer) is buffer
    assert asked == []
