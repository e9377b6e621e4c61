"""Freed memory goes back to the system."""

import platform
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


HEAPS = """
import ctypes, threading
from native.heap import few_arenas

few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.open_memstream.restype = ctypes.c_void_p
together = threading.Barrier(8)

def take():
    together.wait()
    libc.malloc(ctypes.c_size_t(10_000))
    together.wait()

threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
text, size = ctypes.c_char_p(), ctypes.c_size_t()
stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
libc.malloc_info(0, ctypes.c_void_p(stream))
libc.fclose(ctypes.c_void_p(stream))
print(text.value.count(b"<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
def test_all_threads_share_few_heaps():
    ran = subprocess.run(
        [sys.executable, "-c", HEAPS], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert 1 <= int(ran.stdout) <= 2


WRITES = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from kvstore.disk.tier import DiskTier
from tests.kvstore.make import chain, identity, items

model = identity(num_layers=4, num_kv_heads=8, head_dim=128)
tier, writer = DiskTier(Path(sys.argv[1]), 1 << 30), ThreadPoolExecutor(1)
for turn in range(4):
    blocks = items(chain(range(2048 * turn, 2048 * (turn + 1)), model=model, size=128), model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    writer.submit(tier.put, blocks).result()  # as in a store
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / sum(block.nbytes for _, block in blocks))
tier.close()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is told")
def test_a_transaction_is_written_from_memory_of_the_one_before(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path)], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 0.25  # of its bytes were faulted in; without that, all are
