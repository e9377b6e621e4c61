"""Counters and levels of a server's parts, read at one time."""

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from engine.serve.owners import Names
from engine.serve.report import Pool, Process, Running, Swap
from kvstore.pool.pool import Pool as KVPool
from kvstore.stats import StoreStats

NO_SWAP: Final = Swap(
    outs=0, backs=0, copies_out=0, copies_back=0, bytes_out=0, bytes_back=0,
    disk_bytes_written=0, disk_bytes_read=0,
)  # fmt: skip
NOTHING: Final = Running(
    device_bytes=0, device_capacity_bytes=0, lower_bytes=0, lower_capacity_bytes=0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Counts are since the start; waiting, running and swapped are now."""

    waiting: int = 0
    running: int = 0
    swapped: int = 0
    steps: int = 0
    preemptions: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    background: int = 0
    prompt_tokens: int = 0  # computed
    new_tokens: int = 0
    kv: Running = NOTHING
    swap: Swap = NO_SWAP
    pool: Pool | None = None
    store: StoreStats
    tenants: Names = field(default_factory=dict)


Read: TypeAlias = Callable[[], Readings]


def pool_reading(pool: KVPool) -> Pool:
    """Of a pool, and of its spill where it has one."""
    spill = pool.stats()
    return Pool(
        used_bytes=pool.used_bytes,
        capacity_bytes=pool.num_blocks * pool.shape.block_bytes,
        open_leases=pool.open_leases,
        hits=spill.hits,
        promotions=spill.promotions,
        evictions=spill.evictions,
        spilled_bytes=spill.spilled_bytes,
        spill_read_bytes=spill.read_bytes,
    )


def process_reading() -> Process:
    """Of this process, on Linux; elsewhere nobody knows."""
    statm, files = Path("/proc/self/statm"), Path("/proc/self/fd")
    if not statm.exists():
        return Process(rss_bytes=None, open_files=None)
    pages = int(statm.read_text().split()[1])
    open_files = len(os.listdir(files)) - 1  # without the one that lists them
    return Process(rss_bytes=pages * resource.getpagesize(), open_files=open_files)
