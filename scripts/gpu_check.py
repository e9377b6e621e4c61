#!/usr/bin/env python3
"""All checks and benchmarks that a GPU is needed for, part by part; started by scripts/gpu_check.

    tests        those marked gpu
    sanitizer    every kernel at toy sizes under compute-sanitizer, where there is one
    interpreter  the kernels' own tests, in Triton's interpreter on the CPU
    ahead        every kernel compiled for sm_90
    and the parts of scripts/bench_gpu.py, in short form

Each part is a process with a time limit, and what it said before it ended counts. One that fails
hides no other; the exit status is 1 then. The last line of stdout is JSON:

    {"kernels": n, "interpreter_ok": n, "aot_sm90_ok": n, "spills": {build: bytes}}

where kernels are modules. On a GPU it goes on with what was measured, and with the reasons for
what was not. --dry-run, on a CPU, leaves out tests and sanitizer, and times nothing.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_bench.checks import ahead, gpu_tests, interpreter, sanitizer
from gpu_bench.process import ROOT, bench, driver
from gpu_bench.summary import measured
from gpu_bench.table import tables

from native.gpu import kernel_modules

CHECKS_S = 160  # tests and compilation, side by side
BENCH_S = {"kernels": 110, "decode": 120, "copies": 50, "prefill": 60, "blend": 55, "codebook": 20}
DRY_S = 600  # of each part on a CPU, which has other things to do


def say(text: str) -> None:
    print(f"gpu_check: {text}", file=sys.stderr, flush=True)


def checks(modules: list[str], *, dry: bool) -> dict[str, dict[str, Any]]:
    """What does not depend on time, side by side: by name, what was found."""
    limit = DRY_S if dry else CHECKS_S
    runs = {"interpreter": interpreter, "ahead": ahead}
    if not dry:
        runs |= {"tests": gpu_tests, "sanitizer": sanitizer}
    with ThreadPoolExecutor(1 if dry else len(runs)) as pool:
        futures = {name: pool.submit(run, modules, limit) for name, run in runs.items()}
        found = {name: future.result() for name, future in futures.items()}
    for name, at in found.items():
        for module, said in at.items():
            say(f"{name}: {module}: {said}")
    return found


def counted(modules: list[str], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The line's first fields."""
    at = found["ahead"]
    return {
        "kernels": len(modules),
        "interpreter_ok": sum(passes(found["interpreter"].get(name, {})) for name in modules),
        "aot_sm90_ok": sum(at.get(name, {}).get("ok", False) for name in modules),
        "spills": {k: v for name in modules for k, v in at.get(name, {}).get("spills", {}).items()},
    }


def passes(counts: dict[str, Any]) -> bool:
    """Some test passed, and none failed."""
    return bool(counts.get("passed")) and not counts.get("failed") and "error" not in counts


def benches(*, dry: bool) -> list[dict[str, Any]]:
    """The lines of all parts, one after the other: they would disturb each other."""
    found = []
    for part, limit in BENCH_S.items():
        began = time.monotonic()
        lines = bench(part, DRY_S if dry else limit, dry=dry)
        found += lines
        wrong = [line for line in lines if "error" in line]
        say(f"{part}: {len(lines)} lines, {len(wrong)} failed, {time.monotonic() - began:.0f} s")
        for line in wrong:
            say(f"{part}: {line.get('name')}: {line['error']}")
    return found


def write(record: dict[str, Any]) -> Path:
    """One line in a file of its own; not where another run of the commit and day has one."""
    commit = str(record["commit"]).replace("+", "-changed")
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{record['date'][:10]}_{commit}.json"
    path.write_text(json.dumps(record) + "\n")
    return path


def origin() -> dict[str, Any]:
    """What every record says about where its numbers come from, and the driver."""
    import torch
    import triton
    from bench_common import facts

    return facts(torch.device("cuda")) | {"triton": triton.__version__, "driver": driver()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with nothing timed")
    parser.add_argument("--json", action="store_true", help="no tables, the last line alone")
    options = parser.parse_args()
    dry, began = options.dry_run, datetime.now(UTC)
    os.chdir(ROOT)
    modules = kernel_modules(ROOT)
    found = checks(modules, dry=dry)
    lines = benches(dry=dry)
    line = counted(modules, found)
    right = line["interpreter_ok"] == line["aot_sm90_ok"] == line["kernels"]
    right &= not any("error" in x for x in lines)
    if not dry:
        figures, reasons = measured(lines)
        line |= {"measured": figures, "reasons": reasons}
        right &= passes(found["tests"].get("all", {})) and not reasons
        right &= "error" not in found["sanitizer"].get("all", {})
        seconds = (datetime.now(UTC) - began).total_seconds()
        record = {"benchmark": "gpu", "seconds": seconds, "checks": found, "lines": lines}
        say(f"saved to {write(origin() | record | line)}")
    if not options.json:
        print(tables(lines))
    print(json.dumps(line))
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
