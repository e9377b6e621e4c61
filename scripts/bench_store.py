"""Speed of the disk tier beside other ways to keep the same bytes on a disk, in one run.

    python scripts/bench_store.py [--json] [--save] [--blocks N] [--rounds N] [--folder PATH]
                                  [--lmcache [--lmcache-env PATH]]

Blocks of 32 layers x 8 KV heads x 128 x 64 tokens in bfloat16: 8 MiB, stored as 2 MiB values.

get       The disk tier as it is: values in a file of pages, LMDB as its index. What is in the page
          cache is copied out of a map and hashed in one pass, what is not is read by O_DIRECT. It
          ends in tensors, verified: a thread asks for one group of layers of 4 blocks, as the
          engine does. The destination is recycled, as its staging buffer is. `single` asks for one
          value at a time, `fresh` as well, and keeps every tensor.
buffered  the same values by preadv through the page cache alone, verified.
inline    values in LMDB itself, read through its map, verified.
pread     plain files into a recycled buffer, unverified.
raw       O_DIRECT reads of the tier's own payloads, in the same sizes and order, and nothing else.
copy, hash
          what memory gives: memcpy of values out of a buffer of their total size, and XXH3 of it.

put       The same batches of 64 MiB, each acknowledged when it is durable. Tier: values by four
          threads, fdatasync, then a transaction of LMDB that names them. Inline: one transaction
          (data pages, fdatasync, meta page with O_DSYNC). Files: each value to a new file, fsync
          of each, fsync of their folder; no checksums.
cold      page cache dropped (unmapped, fsync, POSIX_FADV_DONTNEED; mincore counts what is left).
hot       everything in the page cache, by reads.
overlap   a prefix loaded layer by layer under computing layers: see store_bench/overlap.py

Sides alternate, and who begins; before each write the disk rests, as many let one write faster
behind a pause (--rest). Medians over rounds, and medians of the rounds' ratios, with the best of
1, 2 and 4 threads on each side.

--lmcache   afterwards the store beside LMCache's backends: see store_bench/beside_lmcache.py
"""

import argparse
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
import xxhash
from bench_common import add_outputs, facts, finish, ratio, save, timed
from store_bench.beside_lmcache import Bench as Beside
from store_bench.beside_lmcache import beside_lmcache
from store_bench.environment import NoLMCache, environment
from store_bench.overlap import overlap
from store_bench.pages import drop, resident_share, rest
from store_bench.sides import (
    GROUPS,
    MODEL,
    SIZE,
    VALUE,
    Buffered,
    Files,
    Inline,
    Raw,
    Side,
    Tier,
)

from kvstore.block import BlockKey, KVBlock
from kvstore.tier import Item

BATCH = 8  # blocks: 64 MiB
THREADS = (1, 2, 4)
COLD = ("get", "buffered", "inline", "pread", "raw")
PUTS = {"get": "put tier", "inline": "put inline", "pread": "put files"}
HOT = ("get", "buffered", "inline", "pread")


def make_items(count: int) -> list[Item]:
    keys = BlockKey.chain(range(count * SIZE), identity=MODEL, tenant=b"bench", size=SIZE)
    data = [
        torch.randint(-(2**15), 2**15, MODEL.block_shape(SIZE), dtype=torch.int16)
        for _ in range(BATCH)
    ]
    return [(key, KVBlock(data[i % BATCH].view(torch.bfloat16))) for i, key in enumerate(keys)]


class Bench:
    """The sides with the same bytes, and what was measured, in GB/s."""

    def __init__(self, folder: Path, blocks: int, rest_s: float) -> None:
        self.rest_s = rest_s
        self.items = make_items(blocks)
        self.nbytes = sum(block.nbytes for _, block in self.items)
        self.values = blocks * len(GROUPS)
        self.folder = folder
        self.rows: dict[str, list[float]] = {}
        self.resident: list[float] = []

    def note(self, row: str, seconds: float) -> None:
        self.rows.setdefault(row, []).append(self.nbytes / 1e9 / seconds)

    def put_round(self, turn: int) -> None:
        """Write everything anew, on each side."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        keys = [key for key, _ in self.items]
        self.sides: dict[str, Side] = {
            "get": Tier(self.folder, keys), "buffered": Buffered(self.folder, keys),
            "inline": Inline(self.folder, keys), "pread": Files(self.folder, keys),
            "raw": Raw(self.folder, keys),
        }  # fmt: skip
        rows = ["get", "inline", "pread"]
        for name in rows[turn % 3 :] + rows[: turn % 3]:
            row, side = PUTS[name], self.sides[name]
            rest(self.rest_s)
            side.open()
            self.note(row, timed(lambda side=side: self.put(side)))
            side.close()

    def put(self, side: Side) -> None:
        for first in range(0, len(self.items), BATCH):
            side.put(self.items[first : first + BATCH])

    def get(self, row: str, work: Callable[[Sequence[int]], None], threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(time.sleep, [0.01] * threads))  # start them
            values = np.random.default_rng(0).permutation(self.values).tolist()
            parts = [values[i::threads] for i in range(threads)]
            self.note(f"{row} {threads}T", timed(lambda: list(pool.map(work, parts))))

    def cold_round(self, turn: int) -> None:
        for threads in THREADS:
            for name in COLD if turn % 2 else COLD[::-1]:
                side = self.sides[name]
                drop(side.paths())
                self.resident.append(resident_share(side.paths()))
                side.open()
                self.get(f"cold {name}", side.get, threads)
                side.close()

    def hot_round(self, turn: int) -> None:
        sides = [self.sides[name] for name in ("get", "inline", "pread")]
        for path in (path for side in sides for path in side.paths()):
            with path.open("rb") as file:
                while file.read(VALUE):
                    pass
        for name in HOT if turn % 2 else HOT[::-1]:
            side = self.sides[name]
            side.open()
            side.get(range(self.values))
            for threads in THREADS:
                self.get(f"hot {name}", side.get, threads)
            if isinstance(side, Tier) and name == "get":
                self.hot_singly(side)
            side.close()

    def hot_singly(self, side: Tier) -> None:
        for threads in THREADS:
            self.get("hot single", side.get_singly, threads)
            kept: list[torch.Tensor] = []
            self.get("hot fresh", lambda part, kept=kept: side.get_singly(part, kept), threads)

    def memory_round(self) -> None:
        """What reading values takes at least: a pass over them in memory."""
        values = np.random.default_rng(0).integers(0, 256, (self.values, VALUE), np.uint8)
        out = np.zeros((max(THREADS), VALUE), np.uint8)

        def copy(part: Sequence[int]) -> None:
            for i in part:
                np.copyto(out[part[0] % len(out)], values[i])

        for threads in THREADS:
            self.get("memory copy", copy, threads)
            self.get(
                "memory hash",
                lambda p: [xxhash.xxh3_128_digest(values[i].data) for i in p],
                threads,
            )

    def best(self, row: str) -> list[float]:
        """Per round, of the number of threads that is best in the median."""
        return max((self.rows[f"{row} {t}T"] for t in THREADS), key=statistics.median)

    def summary(self) -> dict[str, float]:
        return {
            "hot_get_gbps": statistics.median(self.best("hot get")),
            "hot_get_single_gbps": statistics.median(self.best("hot single")),
            "hot_get_vs_memory_copy": ratio(self.best("hot get"), self.best("memory copy")),
            "hot_get_vs_pread": ratio(self.best("hot get"), self.best("hot pread")),
            "cold_get_vs_odirect": ratio(self.best("cold get"), self.best("cold raw")),
            "cold_get_vs_pread": ratio(self.best("cold get"), self.best("cold pread")),
            "cold_inline_vs_odirect": ratio(self.best("cold inline"), self.best("cold raw")),
            "put_vs_files": ratio(self.rows["put tier"], self.rows["put files"]),
            "put_vs_inline": ratio(self.rows["put tier"], self.rows["put inline"]),
        }


def table(bench: Bench, hidden: dict[str, Any]) -> str:
    lines = [f"{'GB/s':<24}{'median':>8}{'min':>8}{'max':>8}"]
    for row, values in sorted(bench.rows.items()):
        numbers = statistics.median(values), min(values), max(values)
        lines.append(f"{row:<24}" + "".join(f"{number:8.2f}" for number in numbers))
    lines.append(f"resident before cold gets: at most {max(bench.resident):.2%} of the pages")
    lines += [f"{name:<24}{value:8.2f}" for name, value in bench.summary().items()]
    lines += [f"{name:<24}{value:8.3f}" for name, value in hidden.items()]
    return "\n".join(lines)


def record(bench: Bench, hidden: dict[str, Any]) -> dict[str, Any]:
    return bench.summary() | hidden | facts(torch.device("cpu")) | {
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
    parser.add_argument("--blocks", type=int, default=64, help="of 8 MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", type=float, default=5.0, help="s, of the disk before each write")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: $TMPDIR")
    add_outputs(parser)
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
    return lambda: beside_lmcache(python, options)


def main() -> None:
    options = arguments()
    second = with_lmcache(options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (Path(folder) / "sides").mkdir()
        bench = Bench(Path(folder) / "sides", options.blocks, options.rest)
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
            bench.put_round(turn)
            bench.cold_round(turn)
            bench.hot_round(turn)
            bench.memory_round()
        hidden = overlap(Path(folder))
    beside = second() if second else None
    if options.save and beside:
        save("store_lmcache", facts(torch.device("cpu")) | beside.record())
    summary = bench.summary() | hidden | ({"lmcache": beside.summary()} if beside else {})
    tables = [table(bench, hidden), *([beside.table()] if beside else [])]
    finish("store", record(bench, hidden), options, summary, lambda: print(*tables, sep="\n\n"))


if __name__ == "__main__":
    main()
