"""Large buffers are marked for large pages; others have small ones of their own."""

import re
import sys
from pathlib import Path

import pytest
import torch

from native.pages import (
    ALIGNED_BYTES,
    LARGE_BYTES,
    LEAST_BYTES,
    aligned,
    large_pages,
    own_large_pages,
    own_pages,
)

SMAPS = Path("/proc/self/smaps")
THP = Path("/sys/kernel/mm/transparent_hugepage")


def marked(address: int, flag: str = "hg") -> bool:
    """Whether the mapping of this address is to use large pages ("hg"), or not to ("nh")."""
    flags = ""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line
    return f" {flag}" in flags


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


@pytest.mark.parametrize(
    ("kind", "flag", "to"), [(own_pages, "nh", ALIGNED_BYTES), (own_large_pages, "hg", LARGE_BYTES)]
)
def test_a_buffer_in_pages_of_its_own_is_zero_begins_one_and_asks_for_its_kind(kind, flag, to):
    if sys.platform != "linux" or not THP.exists():
        pytest.skip("this kernel has no transparent large pages")
    buffer = kind((3, 1 << 20), torch.bfloat16)
    assert buffer.shape == (3, 1 << 20)
    assert not buffer.any()
    assert buffer.data_ptr() % to == 0
    assert marked(buffer.data_ptr(), flag)


@pytest.mark.parametrize("kind", [own_pages, own_large_pages])
@torch.inference_mode()
def test_a_buffer_in_pages_of_its_own_may_be_written_to_in_every_mode(kind):
    buffer = kind((4, 5), torch.float32)
    buffer.fill_(1)
    with torch.inference_mode(False):
        buffer.add_(1)
    assert (buffer == 2).all()
    assert kind((0, 5), torch.float32).shape == (0, 5)


def test_an_aligned_buffer_is_what_a_disk_can_write_to():
    for nbytes in (0, 1, 511, 512, 4096, 1 << 20):
        buffer = aligned((nbytes, 3), torch.bfloat16)
        assert buffer.shape == (nbytes, 3)
        assert buffer.data_ptr() % ALIGNED_BYTES == 0
        buffer.fill_(1)


@pytest.mark.parametrize("kind", [own_pages, own_large_pages])
def test_pages_go_with_the_last_view_of_their_buffer(kind):
    buffer = kind((1 << 24,), torch.uint8)
    view, address = buffer[5:9], buffer.data_ptr()
    del buffer
    view.fill_(3)
    assert mapped(address, 1 << 24)
    del view
    assert not mapped(address, 1 << 24)


def mapped(address: int, size: int) -> bool:
    """Whether all of this memory is there."""
    spans = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.M)
    have = sum(max(0, min(int(b, 16), address + size) - max(int(a, 16), address)) for a, b in spans)
    return have == size
