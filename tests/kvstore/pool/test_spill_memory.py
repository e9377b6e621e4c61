"""What it takes to write and to spill does not grow with how much is written."""

import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

import kvstore.pool.lease
from kvstore.pool.pool import Pool
from kvstore.pool.spill import BATCH_BYTES, Spill
from kvstore.rows import Int4, Int8, PoolShape, Raw, RowLayout
from tests.alive import taken
from tests.kvstore.pool.spilling import LARGE, all_ids, made, numbers, right

BF16 = Raw(torch.bfloat16)
ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20


def written(tokens, codec, folder=None):
    """What it takes to write so many tokens, half of them to disk if there is a folder."""
    shape = PoolShape(1, 8, RowLayout(codec, codec, 128, torch.bfloat16))
    blocks = tokens // shape.block_tokens
    spill = None if folder is None else Spill(folder, 2 * blocks * shape.block_bytes)
    in_memory = blocks if spill is None else blocks // 2
    with closing(Pool(shape, in_memory * shape.block_bytes, spill=spill)) as pool:
        k, v = torch.zeros(2, 8, tokens, 128, dtype=torch.bfloat16)
        with pool.lease() as lease:
            lease.reserve(tokens)
            return taken(lambda: lease.write(0, 0, k, v))


@pytest.mark.parametrize("spilling", [False, True], ids=["in memory", "spilling"])
@pytest.mark.parametrize("codec", [BF16, Int8(), Int4()], ids=lambda c: c.name)
def test_a_long_write_takes_no_more_memory_than_a_short_one(tmp_path, codec, spilling):
    few, many = (written(n, codec, tmp_path if spilling else None) for n in (2048, 8192))
    assert many.most <= few.most + (16 << 10)  # the table of blocks
    assert many.heap <= few.heap + (16 << 10)
    assert many.most <= 20 * MIB


@pytest.mark.parametrize("start", [0, 5, 16, 40])
def test_a_write_in_many_runs_is_one_write_and_brings_no_block_back(tmp_path, monkeypatch, start):
    data = numbers(LARGE, 120, seed=0)
    with closing(made(tmp_path, LARGE, slots=1)) as pool, pool.lease() as lease:
        lease.reserve(120)
        for layer, (k, v) in enumerate(data):
            lease.write(layer, 0, k[:, :start], v[:, :start])
        monkeypatch.setattr(kvstore.pool.lease, "WRITE_NUMBERS", 7 * 2 * 64)  # 7 tokens
        for layer, (k, v) in enumerate(data):
            lease.write(layer, start, k[:, start:], v[:, start:])
        assert pool.stats().promotions == 0
        for layer in range(LARGE.num_layers):
            assert right(lease, layer, all_ids(pool, 120), data)


def test_threads_that_spill_at_once_have_one_batch_in_flight(tmp_path, monkeypatch):
    put, lock, flying, seen = Spill._put, threading.Lock(), [0], []

    def counted(spill, blocks):
        nbytes = sum(len(data) for _, data in blocks)
        with lock:
            flying[0] += nbytes
            seen.append(flying[0])
        places = put(spill, blocks)
        with lock:
            flying[0] -= nbytes
        return places

    monkeypatch.setattr(Spill, "_put", counted)
    value, together = np.zeros(300_000, np.uint8), threading.Barrier(3)
    with closing(Spill(tmp_path, 1 << 30)) as spill:

        def work(first):
            together.wait()
            spill.write([(first + i, value) for i in range(60)])

        threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(spill._places) == 180
    assert max(seen) <= BATCH_BYTES


SPILLING = """
import re, tempfile
from pathlib import Path
import torch
from kvstore.pool.pool import Pool
from kvstore.rows import PoolShape, Raw, RowLayout
from kvstore.pool.spill import Spill

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", text)[1]) << 10

torch.set_num_threads(1)
bf16 = Raw(torch.bfloat16)
shape = PoolShape(1, 8, RowLayout(bf16, bf16, 128, torch.bfloat16))
k, v = torch.ones(2, 8, 4096, 128, dtype=torch.bfloat16)
with Pool(shape, 64 * shape.block_bytes).lease() as warm:
    warm.reserve(4096)
    warm.write(0, 0, k, v)
with tempfile.TemporaryDirectory() as folder:
    pool = Pool(shape, 32 << 20, spill=Spill(Path(folder), 1 << 30))
    with pool.lease() as lease:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM back to what is resident now
        before = status("VmRSS")
        for start in range(0, 65536, 4096):
            lease.reserve(start + 4096)
            lease.write(0, start, k, v)
        lease.gather(0, torch.randint(0, 65536, (8, 1024)))
        print(status("VmHWM") - before - pool.nbytes, pool.stats().spilled_bytes)
    pool.close()
"""


def test_a_process_grows_by_its_slabs_and_little_more_while_it_spills_eight_times_as_much():
    """14 MiB where this was written: 4 of a transaction, 4 of rows read, 6 of a run of writes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", SPILLING]
    out = subprocess.run(run, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    beside, spilled = map(int, out.split())
    assert spilled == 256 * MIB
    assert beside < 32 * MIB
