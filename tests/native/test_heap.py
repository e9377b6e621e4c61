"""Freed memory goes back to the system."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HOLES = """
import ctypes, re
from pathlib import Path
from native.heap import give_back

def resident():
    return int(re.findall(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) * 1024

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
held = [libc.malloc(ctypes.c_size_t(60_000)) for _ in range(1000)]  # from the heap, not mapped
for address in held:
    ctypes.memset(address, 1, 60_000)
for address in held[:-1]:  # the last one keeps the end of the heap where it is
    libc.free(address)
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_holes_in_the_heap_are_given_back():
    ran = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert int(re.fullmatch(r"(-?\d+)\n", ran.stdout)[1]) > 40_000_000
