#!/usr/bin/env python3
"""Load tests of `headrace serve`: what clients wait for, and whether anything is left behind.

    python scripts/bench_serve.py [PROFILE] [--json] [--save] [--seconds S] [--clients N]

mixed         64 clients, arrivals and lengths of Azure's trace ($HEADRACE_DATA), of a BurstGPT file
              (--trace) or of a generator; some go away. Then nothing may be left: memory, files.
long          method headrace, prompts of 16k to 32k tokens, memory for a part of their KV.
interference  streams while long prompts arrive, read in chunks of 512 tokens, and at once.
shared        16 clients with shared prefixes of 8k tokens, beside `transformers serve`.

Servers are subprocesses on the loopback, and end with this one. Exits 1 where a bound is broken.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import facts, save
from rich.console import Console
from serve_bench import interference, long, mixed, shared
from serve_bench.process import ServerFailed
from serve_bench.settings import Bench, bench

CONSOLE = Console(stderr=True, soft_wrap=True)
Measure = Callable[[Bench], tuple[dict[str, Any], list[str]]]
PROFILES: dict[str, tuple[Measure, dict[str, Any]]] = {
    "mixed": (mixed.measure, {"clients": 64, "seconds": 120.0, "new_tokens": 128}),
    "long": (long.measure, {"clients": 4, "seconds": 120.0, "new_tokens": 64}),
    "interference": (interference.measure, {"clients": 8, "seconds": 120.0, "new_tokens": 128}),
    "shared": (shared.measure, {"clients": 16, "seconds": None, "new_tokens": 64}),
}
CONTRACT = ("clients", "requests", "errors", "p99_ttft_s", "p99_tpot_s", "rss_growth")
CONTRACT += ("leaked_bytes",)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("profile", nargs="?", default="mixed", choices=PROFILES)
    made.add_argument("--json", action="store_true", help="end with one JSON line")
    made.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    made.add_argument("--model", default="reference", help="folder, or name under models/")
    made.add_argument("--clients", type=int, help="at once (64; long 4, interference 8, shared 16)")
    made.add_argument("--seconds", type=float, help="of the measured load (120)")
    made.add_argument("--new-tokens", type=int, help="of an answer, at most (128; long, shared 64)")
    made.add_argument("--timeout", type=float, default=300.0, help="of a request (%(default)s)")
    made.add_argument("--threads", type=int, help="of the server (torch's choice)")
    made.add_argument("--seed", type=int, default=0)
    group = made.add_argument_group("mixed")
    group.add_argument("--trace", type=Path, metavar="CSV", help="arrivals: Azure's or BurstGPT's")
    group.add_argument("--generate", action="store_true", help="draw arrivals, trace or not")
    group.add_argument("--rate", type=float, default=8.0, help="requests per s (%(default)s)")
    group.add_argument("--max-tokens", type=int, default=4096, help="of a request (%(default)s)")
    group.add_argument("--warm", type=float, default=30.0, help="s, a few times (%(default)s)")
    group.add_argument("--leave", type=float, default=0.15, help="clients' share (%(default)s)")
    group = made.add_argument_group("long")
    group.add_argument("--longest", type=int, default=32768, help="tokens (%(default)s)")
    group.add_argument("--pinned-mib", type=float, default=128.0, help="(%(default)s)")
    group = made.add_argument_group("interference")
    group.add_argument("--every", type=float, default=5.0, help="s to the next (%(default)s)")
    group.add_argument("--step-tokens", type=int, default=512, help="(%(default)s)")
    group.add_argument("--long-tokens", type=int, default=8192, help="its length (%(default)s)")
    group = made.add_argument_group("shared")
    group.add_argument("--rounds", type=int, default=3)
    group.add_argument("--prefix-tokens", type=int, default=8192, help="(%(default)s)")
    group.add_argument("--theirs", default="", help="more options of `transformers serve`")
    return made


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so blocks end
    options = parser().parse_args()
    measure, defaults = PROFILES[options.profile]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        try:
            found, wrong = measure(bench(options, Path(folder)))
        except ServerFailed as error:
            CONSOLE.print(f"bench_serve: {error}", style="red")
            return 1
    record = _record(options, found)
    for line in wrong:
        CONSOLE.print(f"bench_serve: {line}", style="red")
    if options.save:
        CONSOLE.print(f"saved to {save(f'serve_{options.profile}', record)}")
    show(record)
    if options.json:
        print(json.dumps({x: record[x] for x in CONTRACT} | {"wrong": wrong} | found), flush=True)
    return 1 if wrong else 0


def _record(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    about = {x: getattr(options, x) for x in ("clients", "seconds", "new_tokens", "seed")}
    about |= {"benchmark": f"serve_{options.profile}", "model": Path(options.model).name}
    return facts(torch.device("cpu")) | about | found


def show(record: dict[str, Any]) -> None:
    """The numbers of the contract, and what the profile is about."""
    keys = (*CONTRACT, "p50_ttft_s", "p50_tpot_s", "left", "ratio", "tpot_ratio")
    keys += ("spill_read_bytes",)
    for key in (x for x in keys if record.get(x) is not None):
        value = record[key]
        CONSOLE.print(
            f"{key:>18}  {value:.4g}" if isinstance(value, float) else f"{key:>18}  {value}"
        )


if __name__ == "__main__":
    sys.exit(main())
