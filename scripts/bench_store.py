"""Speed of the disk tier beside plain files and the raw disk, in one run.

    python scripts/bench_store.py [--json] [--save] [--blocks N] [--rounds N] [--folder PATH]
                                  [--lmcache [--lmcache-env PATH]]

Blocks of 32 layers x 8 KV heads x 128 x 64 tokens in bfloat16: 8 MiB, stored as 2 MiB values.

put   Both sides take the same batches of 64 MiB and acknowledge a batch when it is durable. LMDB:
      one transaction (data pages, fdatasync, meta page with O_DSYNC). Files: each value to a new
      file, fsync of each, fsync of their folder. Content is checksummed on the LMDB side only.
get   hot: everything in the page cache. A get ends in tensors, verified: a thread asks for one
      group of layers of 4 blocks, as the engine does. The destination is recycled, as its staging
      buffer is. `single` asks for one value at a time, `fresh` as well, and keeps every tensor.
      cold: page cache dropped (unmapped, fsync, POSIX_FADV_DONTNEED; mincore counts what is left).
      pread: the same bytes from the plain files into a recycled buffer, unverified, with the
      best of 1, 2 and 4 threads on each side.
raw   sequential O_DIRECT reads of one of the files' bytes, 4 MiB at a time.

A and B alternate; medians over rounds, and medians of the rounds' ratios.

--lmcache   afterwards the store beside LMCache's backends: see store_bench/beside_lmcache.py
"""

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from bench_common import facts, save
from store_bench.beside_lmcache import Bench as Beside
from store_bench.beside_lmcache import beside_lmcache
from store_bench.environment import NoLMCache, environment
from store_bench.pages import drop, resident_share

from kvstore.block import BlockKey, KVBlock
from kvstore.disk import DiskTier
from kvstore.identity import ModelIdentity
from kvstore.layout import layer_groups

MODEL = ModelIdentity(b"bench", (), "{}", "bfloat16", 32, 8, 128, "{}")
SIZE = 64
GROUPS = layer_groups(32, 2 * 8 * 128 * SIZE * 2)
VALUE = 2 << 20
BATCH = 8  # blocks: 64 MiB
TOGETHER = 4  # blocks of which a thread gets a value each: 8 MiB
THREADS = (1, 2, 4)


def make_items(count: int) -> list[tuple[BlockKey, KVBlock]]:
    keys = BlockKey.chain(range(count * SIZE), identity=MODEL, tenant=b"bench", size=SIZE)
    data = [
        torch.randint(-(2**15), 2**15, MODEL.block_shape(SIZE), dtype=torch.int16)
        for _ in range(BATCH)
    ]
    return [(key, KVBlock(data[i % BATCH].view(torch.bfloat16))) for i, key in enumerate(keys)]


def batches(items: Sequence[tuple[BlockKey, KVBlock]]) -> list[Sequence[tuple[BlockKey, KVBlock]]]:
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def put_lmdb(tier: DiskTier, items: Sequence[tuple[BlockKey, KVBlock]]) -> None:
    for batch in batches(items):
        tier.put(batch)


def put_files(folder: Path, items: Sequence[tuple[BlockKey, KVBlock]]) -> None:
    for batch in batches(items):
        written = []
        for key, block in batch:
            for number, layers in enumerate(GROUPS):
                name = folder / f"{key.digest.hex()}.{number}"
                handle = os.open(name, os.O_CREAT | os.O_WRONLY, 0o600)
                part = block.data[layers.start : layers.stop]
                os.write(handle, part.view(-1).view(torch.uint8).numpy().data)
                written.append(handle)
        for handle in written:
            os.fsync(handle)
            os.close(handle)
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """The two sides with the same bytes, and what was measured, in GB/s."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self.items = make_items(blocks)
        self.nbytes = sum(block.nbytes for _, block in self.items)
        self.values = blocks * len(GROUPS)
        self.folder, self.files = folder, folder / "files"
        self.tier: DiskTier | None = None
        self.rows: dict[str, list[float]] = {}
        self.resident: list[float] = []

    def note(self, row: str, seconds: float) -> None:
        self.rows.setdefault(row, []).append(self.nbytes / 1e9 / seconds)

    def open(self) -> DiskTier:
        self.tier = DiskTier(self.folder / "store", 2 * self.nbytes)
        return self.tier

    def paths(self) -> list[Path]:
        return sorted(self.files.iterdir())

    def put_round(self, first: str) -> None:
        if self.tier:
            self.tier.close()
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        tier = self.open()
        sides = {
            "put lmdb": lambda: put_lmdb(tier, self.items),
            "put files": lambda: put_files(self.files, self.items),
        }
        os.sync()
        for side in sorted(sides, reverse=first == "put lmdb"):
            self.note(side, timed(sides[side]))

    def get_tier(self, part: Sequence[int]) -> None:
        """One group of layers of some blocks at a time, as the engine loads a prefix."""
        assert self.tier is not None
        _, *rest = MODEL.block_shape(SIZE)
        recycled = torch.empty(TOGETHER, len(GROUPS[0]), *rest, dtype=torch.bfloat16)
        for number, group in enumerate(GROUPS):
            keys = [self.key(i) for i in part if i % len(GROUPS) == number]
            for first in range(0, len(keys), TOGETHER):
                some = keys[first : first + TOGETHER]
                assert all(self.tier.read_many(some, group, recycled[: len(some)]))

    def get_singly(self, part: Sequence[int], keep: list[torch.Tensor] | None = None) -> None:
        assert self.tier is not None
        _, *rest = MODEL.block_shape(SIZE)
        recycled = torch.empty(len(GROUPS[0]), *rest, dtype=torch.bfloat16)
        for i in part:
            group = GROUPS[i % len(GROUPS)]
            data = self.tier.read(self.key(i), group, recycled if keep is None else None)
            assert data is not None
            if keep is not None:
                keep.append(data)

    def key(self, value: int) -> BlockKey:
        return self.items[value // len(GROUPS)][0]

    def get_files(self, part: Sequence[int]) -> None:
        buffer = torch.empty(VALUE, dtype=torch.uint8).numpy()
        for i in part:
            name = f"{self.key(i).digest.hex()}.{i % len(GROUPS)}"
            handle = os.open(self.files / name, os.O_RDONLY)
            assert os.preadv(handle, [buffer], 0) == VALUE
            os.close(handle)

    def get(self, row: str, work: Callable[[Sequence[int]], None], threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(time.sleep, [0.01] * threads))  # start them
            values = np.random.default_rng(0).permutation(self.values).tolist()
            parts = [values[i::threads] for i in range(threads)]
            self.note(f"{row} {threads}T", timed(lambda: list(pool.map(work, parts))))

    def cold(self, row: str, work: Callable[[Sequence[int]], None], threads: int) -> None:
        assert self.tier is not None
        self.tier.close()  # pages that a map holds cannot be dropped
        data = [self.folder / "store" / "data.mdb", *self.paths()]
        drop(data)
        self.resident.append(resident_share(data))
        self.open()
        self.get(row, work, threads)

    def get_round(self, turn: int) -> None:
        for threads in THREADS:
            pair = [("cold get", self.get_tier), ("cold pread", self.get_files)]
            for row, work in pair if turn % 2 else pair[::-1]:
                self.cold(row, work, threads)
        self.get_tier(range(self.values))
        self.get_files(range(self.values))
        for threads in THREADS:
            self.get("hot get", self.get_tier, threads)
            self.get("hot get single", self.get_singly, threads)
            self.get("hot pread", self.get_files, threads)
            kept: list[torch.Tensor] = []
            self.get("hot get fresh", lambda part, kept=kept: self.get_singly(part, kept), threads)

    def raw_round(self) -> None:
        path = self.folder / "store" / "data.mdb"
        buffer = mmap.mmap(-1, 4 << 20)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        ends = range(0, min(self.nbytes, path.stat().st_size) - len(buffer), len(buffer))
        seconds = timed(lambda: [os.preadv(handle, [buffer], at) for at in ends])
        os.close(handle)
        self.note("raw O_DIRECT 1T", seconds * self.nbytes / (len(ends) * len(buffer)))

    def best(self, row: str) -> list[float]:
        """Per round, of the number of threads that is best in the median."""
        return max((self.rows[f"{row} {t}T"] for t in THREADS), key=statistics.median)

    def summary(self) -> dict[str, float]:
        return {
            "hot_get_gbps": statistics.median(self.best("hot get")),
            "hot_get_single_gbps": statistics.median(self.best("hot get single")),
            "hot_get_vs_pread": ratio(self.best("hot get"), self.best("hot pread")),
            "cold_get_vs_pread": ratio(self.best("cold get"), self.best("cold pread")),
            "put_vs_files": ratio(self.rows["put lmdb"], self.rows["put files"]),
        }


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def table(bench: Bench) -> str:
    lines = [f"{'GB/s':<20}{'median':>8}{'min':>8}{'max':>8}"]
    for row, values in sorted(bench.rows.items()):
        numbers = statistics.median(values), min(values), max(values)
        lines.append(f"{row:<20}" + "".join(f"{number:8.2f}" for number in numbers))
    lines.append(f"resident before cold gets: at most {max(bench.resident):.2%} of the pages")
    lines += [f"{name:<20}{value:8.2f}" for name, value in bench.summary().items()]
    return "\n".join(lines)


def record(bench: Bench) -> dict[str, Any]:
    return bench.summary() | facts(torch.device("cpu")) | {
        "lmdb": ".".join(map(str, lmdb.version())), "kernel": platform.release(),
        "bench": "store", "unit": "GB/s (1e9)",
        "block_shape": MODEL.block_shape(SIZE), "dtype": MODEL.dtype, "value_bytes": VALUE,
        "total_bytes": bench.nbytes, "rounds": bench.rows,
        "resident_before_cold": max(bench.resident),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=128, help="of 8 MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: $TMPDIR")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--lmcache", action="store_true", help="beside LMCache, too")
    parser.add_argument("--lmcache-env", type=Path, help="its environment; default: in your cache")
    return parser.parse_args()


def with_lmcache(options: argparse.Namespace) -> Callable[[], Beside] | None:
    """The second bench, ready to run. Ends the program where LMCache cannot be had."""
    if not options.lmcache:
        return None
    try:
        python = environment(options.lmcache_env)
    except NoLMCache as error:
        print(f"skipped: LMCache cannot be installed here: {error}", file=sys.stderr)
        sys.exit(2)
    return lambda: beside_lmcache(python, options.folder, options.blocks, options.rounds)


def main() -> None:
    options = arguments()
    second = with_lmcache(options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), options.blocks)
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
            bench.put_round("put lmdb" if turn % 2 else "put files")
            bench.get_round(turn)
            bench.raw_round()
    beside = second() if second else None
    if options.save:
        save("store", record(bench))
        if beside:
            save("store_lmcache", facts(torch.device("cpu")) | beside.record())
    summary = bench.summary() | ({"lmcache": beside.summary()} if beside else {})
    tables = [table(bench), *([beside.table()] if beside else [])]
    print(json.dumps(summary) if options.json else "\n\n".join(tables))


if __name__ == "__main__":
    main()
