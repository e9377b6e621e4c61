"""A store at the limit of its disk budget, under churn: do file, memory and latency stay flat?

    scripts/soak [--minutes M] [--disk-gib G] [--plot PNG] [--json] [--save] [--folder PATH]

Conversations of up to 32 blocks of 2 MiB are asked for by popularity (Zipf) and forgotten: what a
lookup finds is read and compared with what was written, what it does not find is put. They come at
a rate that the disk bears (--rate), so that latencies are the store's and not those of a queue.
Each window of ten seconds is a point: size of the data file, resident memory, median and p99 of
the time that a block takes that is read with its conversation.

Fails (exit 1) where a block was wrong, the file grew beyond 1.05 of the budget, or the last third
of windows has more memory (2 %) or slower medians (1.25 times) than the second third.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import facts, save
from rich.console import Console
from soaking.churn import Churn
from soaking.plot import plot
from soaking.watch import Window, resident_bytes, verdict

from kvstore.config import GIB, StoreConfig
from kvstore.disk.environment import files_bytes
from kvstore.store import TieredStore

CONSOLE = Console(stderr=True, soft_wrap=True)
HOST_BYTES = 256 << 20
READERS = 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=30.0, help="behind filling (%(default)s)")
    made.add_argument("--window", type=float, default=10.0, metavar="S", help="(%(default)s)")
    made.add_argument("--disk-gib", type=float, default=6.0, help="budget (%(default)s)")
    made.add_argument(
        "--rate", type=float, default=8.0, help="conversations a second (%(default)s)"
    )
    made.add_argument("--folder", type=Path, help="on the disk to be tested (a temporary one)")
    made.add_argument("--plot", type=Path, metavar="PNG", help="to be drawn")
    made.add_argument("--json", action="store_true", help="end with one JSON line")
    made.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    made.add_argument("--seed", type=int, default=0)
    return made


def main() -> int:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=options.folder) as folder:
        record = soak(options, Path(folder))
    for line in record["wrong"]:
        CONSOLE.print(f"soak: {line}", style="red")
    if options.plot is not None:
        plot(record, options.plot)
    if options.save:
        CONSOLE.print(f"saved to {save('soak', record)}")
    if options.json:
        print(json.dumps({x: y for x, y in record.items() if x != "windows"}), flush=True)
    return 1 if record["wrong"] else 0


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of a run."""
    budget = int(options.disk_gib * GIB)
    config = StoreConfig(host_bytes=HOST_BYTES, disk_path=str(folder), disk_bytes=budget)
    with TieredStore.open(config) as store:
        churn = Churn(store, seed=options.seed)
        filled = churn.fill()
        CONSOLE.print(f"filled with {filled} conversations")
        windows = watched(options, churn, folder)
        stats = store.stats().tiers["disk"]
        audit = store.audit()
    wrong = verdict(windows, budget, churn.wrong) + audit.problems
    wrong += [] if stats.evictions else ["nothing was evicted: run it longer, or lower --disk-gib"]
    about = {"benchmark": "soak", "minutes": options.minutes, "budget_bytes": budget}
    found = {"blocks_read": churn.blocks_read, "blocks_put": churn.blocks_put, "wrong": wrong}
    found |= {
        "evictions": stats.evictions,
        "file_share": max(w.file_bytes for w in windows) / budget,
    }
    rows = [w._asdict() for w in windows]
    return facts(torch.device("cpu")) | about | found | {"windows": rows}


def watched(options: argparse.Namespace, churn: Churn, folder: Path) -> list[Window]:
    """Let the churn run, and look at it once a window."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=churn.run, args=(stop, options.rate / READERS, number))
        for number in range(READERS)
    ]
    for thread in threads:
        thread.start()
    windows: list[Window] = []
    end = time.monotonic() + 60 * options.minutes
    try:
        while time.monotonic() < end and all(thread.is_alive() for thread in threads):
            stop.wait(options.window)
            times = churn.taken()
            if times:
                at = Window.of(times, files_bytes(folder), resident_bytes())
                windows.append(at)
                CONSOLE.print(str(at))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    churn.raise_failure()
    return windows


if __name__ == "__main__":
    sys.exit(main())
