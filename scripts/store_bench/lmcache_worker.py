"""LMCache's backends in host memory and on disk, driven from outside in its own environment.

    python -m store_bench.lmcache_worker VALUES FOLDER

VALUES is a file with the KV of some chunks. A line of JSON on stdin asks for a round, a line on
stdout has its seconds, and whether what was read is what VALUES says.

Nothing of LMCache is replaced. Where a round is to be durable, the disk backend's `write_file` is
followed by an fsync of the file (in its own thread, of which it has four), and the round ends with
one of their folder: it has no such option.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

from store_bench.pages import drop

LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 256
SHAPE = torch.Size((2, LAYERS, TOKENS, HEADS * DIM))  # LMCache's KV_2LTD
MODEL = "bench"
GIB = 1 << 30
LIMIT_S = 120.0


class DiskBackend(LocalDiskBackend):
    """LMCache's, which also flushes what it writes if told so."""

    durable = False

    def write_file(self, buffer: Any, path: str) -> None:
        super().write_file(buffer, path)
        if self.durable:
            flush(Path(path))


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


class Worker:
    """Both backends, and the chunks that they store."""

    def __init__(self, values: Path, folder: Path) -> None:
        self.source = torch.from_file(
            str(values), size=values.stat().st_size // 2, dtype=torch.bfloat16
        ).clone().view(-1, *SHAPE)  # fmt: skip
        self.out = self.source.clone()
        self.folder = folder
        # Host memory: what is stored, and what is read from the disk. Disk: without bound, as
        # `remove` of 0.5.6 does not count what it frees, and what does not fit is left out.
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=TOKENS, local_cpu=True,
            max_local_cpu_size=2 * self.source.nbytes / GIB + 1 / 16,
            local_disk=str(folder), max_local_disk_size=1 << 20,
        )  # fmt: skip
        about = LMCacheMetadata(
            model_name=MODEL, world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
            kv_dtype=torch.bfloat16, kv_shape=(LAYERS, 2, TOKENS, HEADS, DIM),
        )  # fmt: skip
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self.host = LocalCPUBackend(config, about, dst_device="cpu")
        self.disk = DiskBackend(config, loop, self.host, dst_device="cpu")
        self.generation = 0
        self.stored: list[CacheEngineKey] = []  # on disk

    def keys(self) -> list[CacheEngineKey]:
        first = self.generation * len(self.source)
        numbers = range(first, first + len(self.source))
        return [CacheEngineKey(MODEL, 1, 0, number, torch.bfloat16) for number in numbers]

    def host_put(self) -> None:
        """New chunks; where the memory is full, the oldest make room."""
        self.generation += 1
        for key, chunk in zip(self.keys(), self.source, strict=True):
            held = self.host.allocate(SHAPE, torch.bfloat16)
            held.tensor.copy_(chunk)
            self.host.submit_put_task(key, held)
            held.ref_count_down()

    def host_get(self) -> None:
        for key, row in zip(self.keys(), self.out, strict=True):
            held = self.host.get_blocking(key)
            row.copy_(held.tensor)
            held.ref_count_down()

    def prepare_disk_put(self) -> list[MemoryObj]:
        """The chunks in host memory that are to be written, where nothing is yet."""
        for key in self.stored:
            self.disk.remove(key)
        self.stored = self.keys()
        return [self.host.get_blocking(key) for key in self.stored]

    def disk_put(self, held: list[MemoryObj]) -> None:
        done = threading.Semaphore(0)
        self.disk.batched_submit_put_task(
            self.stored, held, on_complete_callback=lambda key: done.release()
        )
        for key in self.stored:
            if not done.acquire(timeout=LIMIT_S):
                raise TimeoutError(f"LMCache did not write {key} within {LIMIT_S} s")
        if self.disk.durable:
            flush(self.folder)

    def round(self, what: str) -> dict[str, Any]:
        """One round, and what it took."""
        right = True
        if what in ("host_put", "host_get"):
            seconds = timed(getattr(self, what))
            right = what == "host_put" or same(self.out, self.source)
            self.out.fill_(0)
        elif what in ("disk_put", "disk_put_unsynced"):
            held = self.prepare_disk_put()
            self.disk.durable = what == "disk_put"
            os.sync()
            seconds = timed(lambda: self.disk_put(held))
            release(held)
        elif what == "disk_get":
            read: list[MemoryObj] = []
            seconds = timed(lambda: read.extend(self.disk.batched_get_blocking(self.stored)))
            right = all(same(a.tensor, b) for a, b in zip(read, self.source, strict=True))
            release(read)
        elif what == "drop":
            seconds = timed(lambda: drop(sorted(self.folder.iterdir())))
        else:
            raise ValueError(f"no such round: {what}")
        return {"seconds": seconds, "right": right}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def release(held: list[MemoryObj]) -> None:
    for one in held:
        one.ref_count_down()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # LMCache logs to stdout
    torch.set_num_threads(1)
    worker = Worker(Path(sys.argv[1]), Path(sys.argv[2]))
    about = {name: version(name) for name in ("lmcache", "torch", "numpy")}
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps(worker.round(json.loads(line)["do"])), file=answers)


if __name__ == "__main__":
    main()
