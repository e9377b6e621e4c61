"""Counters and levels of a server's parts, read at one time."""

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from engine.serve.owners import Names
from engine.serve.report import Pool, Process
from engine.service.stats import ServiceStats
from kvstore.pool.pool import Pool as KVPool
from kvstore.stats import StoreStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Of the service, of the pool of sparse requests where there is one, and of the store."""

    service: ServiceStats
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
