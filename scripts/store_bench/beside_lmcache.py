"""Our store beside LMCache's backends in host memory and on disk: the same bytes, in turn.

Chunks of 256 tokens x 32 layers x 8 KV heads x 128 in bfloat16: 32 MiB, which LMCache stores as one
object and we as four blocks. LMCache runs in its own process and environment, without a GPU.

host_put   A tensor with all KV to host memory that is full, so that the oldest go. Ours:
           `TieredStore.put`, which copies. Theirs: allocate, copy, `submit_put_task`.
host_get   From there to a tensor that was used before. Ours: `HostTier.read_many`. Theirs:
           `get_blocking`, copy. One thread on both sides. Neither verifies: nothing left memory.
disk_put   What lies in host memory to the disk, durable when the round ends. Ours: `put` and
           `flush`. Theirs: `batched_submit_put_task`, with an fsync of every file and their folder
           added, until the last is done.
disk_put_unsynced
           Each as it ships: ours durable, with checksums; theirs in the page cache, without.
disk_get   Cold: none of it in the page cache. Ours: `read_many` to a tensor that was used before,
           in large pages as the engine's, verified. Theirs: `batched_get_blocking` to its own host
           memory, and no copy from there.
disk_get_hot
           The same from the page cache.

Four threads read on each side, and four of theirs write; as both ship. The two sides alternate, and
who begins too. Results are ours over LMCache's: medians of the rounds' ratios.
"""

import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_common import ratio, timed

from kvstore.block import BlockKey, KVBlock
from kvstore.disk.environment import files_of
from kvstore.disk.tier import DiskTier
from kvstore.identity import ModelIdentity
from kvstore.store import TieredStore
from kvstore.tier import HostTier, Item
from native.pages import own_large_pages
from store_bench.pages import drop, rest
from store_bench.process import Process

LAYERS, HEADS, DIM, SIZE = 32, 8, 128, 64
MODEL = ModelIdentity(b"bench", (), "{}", "bfloat16", LAYERS, HEADS, DIM, "{}")
CHUNK_BLOCKS = 4  # blocks of 64 tokens in a chunk of 256
CONTRACT = ("host_put", "host_get", "disk_put", "disk_get")
ROWS = ("host_put", "host_get", "disk_put", "disk_put_unsynced", "disk_get", "disk_get_hot")
MOST_BLOCKS = 64  # 512 MiB, which memory holds seven times meanwhile
WARM_UPS = 2  # rounds in host memory until both sides use theirs again


class Ours:
    """The store's side of every round, with the interface of the worker."""

    def __init__(self, values: Path, folder: Path) -> None:
        shape = MODEL.block_shape(SIZE)
        self.source = torch.from_file(
            str(values), size=values.stat().st_size // 2, dtype=torch.bfloat16
        ).clone().view(-1, *shape)  # fmt: skip
        self.out = own_large_pages(self.source.shape, torch.bfloat16).copy_(self.source)
        self.folder = folder
        self.host = HostTier(self.source.nbytes)
        self.memory = TieredStore([self.host])
        self.disk = self.open()
        self.generation = 0
        self.stored: list[BlockKey] = []

    def open(self) -> TieredStore:
        return TieredStore([DiskTier(self.folder, 2 * self.source.nbytes)])

    def close(self) -> None:
        self.memory.close()
        self.disk.close()

    def keys(self) -> list[BlockKey]:
        count, name = len(self.source) * SIZE, b"%d" % self.generation
        return BlockKey.chain(range(count), identity=MODEL, tenant=name, size=SIZE)

    def seconds(self, what: str) -> float:
        return float(getattr(self, what)())

    def host_put(self) -> float:
        self.generation += 1
        items = [(k, KVBlock(row)) for k, row in zip(self.keys(), self.source, strict=True)]
        seconds = timed(lambda: self.memory.put(items))
        assert all(key in self.memory for key in self.keys())
        return seconds

    def host_get(self) -> float:
        found: list[bool] = []
        keys = self.keys()
        seconds = timed(lambda: found.extend(self.host.read_many(keys, range(LAYERS), self.out)))
        self.check(found)
        return seconds

    def disk_put(self) -> float:
        items: list[Item] = []
        self.disk.clear()
        for key in self.keys():
            block = self.host.get(key)
            assert block is not None
            items.append((key, block))
        self.stored = self.keys()
        os.sync()
        return timed(lambda: self.write(items))

    disk_put_unsynced = disk_put  # it has no other way

    def write(self, items: Sequence[Item]) -> None:
        self.disk.put(items)
        self.disk.flush()

    def drop(self) -> float:
        self.disk.close()  # pages that a map holds cannot be dropped
        drop(files_of(self.folder))
        self.disk = self.open()
        return 0.0

    def disk_get(self) -> float:
        found: list[bool] = []
        layers = range(LAYERS)
        seconds = timed(lambda: found.extend(self.disk.read_many(self.stored, layers, self.out)))
        self.check(found)
        return seconds

    def check(self, found: Sequence[bool]) -> None:
        assert all(found), "a block is missing"
        assert torch.equal(self.out.view(torch.int16), self.source.view(torch.int16))
        self.out.fill_(0)


class Bench:
    """Both sides, and the seconds that each took in every round."""

    def __init__(self, ours: Ours, theirs: Process, rest_s: float) -> None:
        self.rest_s = rest_s
        self.sides = {"ours": ours, "lmcache": theirs}
        self.nbytes = ours.source.nbytes
        self.about = theirs.about
        self.rows: dict[str, dict[str, list[float]]] = {}

    def warm_up(self) -> None:
        for turn in range(WARM_UPS):
            self.both("host_put", turn, row=f"host_put_{turn + 1}")
            self.both("host_get", turn, row=None)

    def round(self, turn: int) -> None:
        for what in ("host_put", "host_get", "disk_put_unsynced", "disk_put"):
            self.both(what, turn)
        self.both("drop", turn, row=None)
        self.both("disk_get", turn)
        self.both("disk_get", turn, row=None)  # our first read passes the page cache by
        self.both("disk_get", turn, row="disk_get_hot")

    def both(self, what: str, turn: int, row: str | None = "") -> None:
        for name in sorted(self.sides, reverse=turn % 2 == 1):
            if what.startswith("disk_put"):
                rest(self.rest_s)
            seconds = self.sides[name].seconds(what)
            if row is not None:
                rows = self.rows.setdefault(row or what, {"ours": [], "lmcache": []})
                rows[name].append(self.nbytes / 1e9 / seconds)

    def ratio(self, row: str) -> float:
        return ratio(self.rows[row]["ours"], self.rows[row]["lmcache"])

    def summary(self) -> dict[str, float]:
        return {row: self.ratio(row) for row in CONTRACT}

    def record(self) -> dict[str, Any]:
        """For a line of a results file."""
        return {
            "bench": "store_lmcache", "unit": "GB/s (1e9)", "theirs": self.about,
            "total_bytes": self.nbytes, "block_shape": MODEL.block_shape(SIZE),
            "ratios": {row: self.ratio(row) for row in self.rows}, "rounds": self.rows,
        }  # fmt: skip

    def table(self) -> str:
        lines = [f"{'GB/s':<20}{'ours':>8}{'LMCache':>8}{'ratio':>8}"]
        for row, sides in self.rows.items():
            numbers = *(statistics.median(sides[x]) for x in ("ours", "lmcache")), self.ratio(row)
            lines.append(f"{row:<20}" + "".join(f"{number:8.2f}" for number in numbers))
        return "\n".join(lines)


def beside_lmcache(python: Path, options: Namespace) -> Bench:
    """All rounds.

    Args:
        python: of an environment with LMCache.
        options: of bench_store; blocks are rounded down to whole chunks, and at most 64.
    """
    blocks, rounds = options.blocks, options.rounds
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        values, (ours, theirs) = Path(made) / "values", (Path(made) / x for x in ("ours", "theirs"))
        theirs.mkdir()
        make_values(values, max(1, min(blocks, MOST_BLOCKS) // CHUNK_BLOCKS) * CHUNK_BLOCKS)
        command = [str(python), "-m", "store_bench.lmcache_worker", str(values), str(theirs)]
        side = Ours(values, ours)
        with Process(command, Path(made) / "log") as worker:
            bench = Bench(side, worker, options.rest)
            bench.warm_up()
            for turn in range(rounds):
                print(f"beside LMCache: round {turn + 1} of {rounds}", file=sys.stderr)
                bench.round(turn)
        side.close()
        return bench


def make_values(path: Path, blocks: int) -> None:
    shape = (blocks, *MODEL.block_shape(SIZE))
    numbers = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    path.write_bytes(numbers.numpy().tobytes())
