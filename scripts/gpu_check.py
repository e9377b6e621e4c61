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
what was not; the record is written after every part, so that what ends this early leaves what there
is. --dry-run, on a CPU, leaves out tests and sanitizer, and times nothing.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_bench.checks import ahead, gpu_tests, interpreter, sanitizer
from gpu_bench.process import ROOT, bench, driver, end_all
from gpu_bench.summary import measured
from gpu_bench.table import tables

from native.gpu import kernel_modules

RESULTS = ROOT / "benchmarks" / "results"

CHECKS: dict[str, Callable[[list[str], float], dict[str, dict[str, Any]]]] = {
    "tests": gpu_tests,
    "sanitizer": sanitizer,
    "interpreter": interpreter,
    "ahead": ahead,
}
CHECKS_S = 135  # side by side; with all of BENCH_S, ends and starts it is less than ten minutes
BENCH_S = {"kernels": 110, "decode": 120, "copies": 50, "prefill": 60, "blend": 55, "codebook": 20}
DRY_S = 600  # of each part on a CPU, which has other things to do
NEED_NO_GPU = ("interpreter", "ahead")


def say(text: str) -> None:
    print(f"gpu_check: {text}", file=sys.stderr, flush=True)


def checks(modules: list[str], parts: Sequence[str], *, dry: bool) -> dict[str, dict[str, Any]]:
    """What does not depend on time, side by side: by name, what was found."""
    limit = DRY_S if dry else CHECKS_S
    runs = [name for name in parts if name in CHECKS and (name in NEED_NO_GPU or not dry)]
    with ThreadPoolExecutor(1 if dry else len(CHECKS)) as pool:
        futures = {name: pool.submit(CHECKS[name], modules, limit) for name in runs}
        try:
            found = {name: future.result() for name, future in futures.items()}
        except KeyboardInterrupt:  # the pool waits for its threads, and they for their processes
            end_all()
            raise
    for name, at in found.items():
        for module, said in at.items():
            say(f"{name}: {module}: {said}")
    return found


def counted(modules: list[str], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The line's first fields, as far as their parts have run."""
    line: dict[str, Any] = {"kernels": len(modules)}
    if (own := found.get("interpreter")) is not None:
        line["interpreter_ok"] = sum(passes(own.get(name, {})) for name in modules)
    if (at := found.get("ahead")) is not None:
        line["aot_sm90_ok"] = sum(at.get(name, {}).get("ok", False) for name in modules)
        spills = [at.get(name, {}).get("spills", {}) for name in modules]
        line["spills"] = {build: size for one in spills for build, size in one.items()}
    return line


def right(modules: list[str], found: dict[str, dict[str, Any]]) -> bool:
    """Whether all that was checked is as it should be."""
    line = counted(modules, found)
    whole = {line.get(name, len(modules)) for name in ("interpreter_ok", "aot_sm90_ok")}
    at = {name: found[name].get("all", {}) for name in ("tests", "sanitizer") if name in found}
    clean = "error" not in at.get("sanitizer", {})
    return whole == {len(modules)} and clean and ("tests" not in at or passes(at["tests"]))


def passes(counts: dict[str, Any]) -> bool:
    """Some test passed, and none failed."""
    return bool(counts.get("passed")) and not counts.get("failed") and "error" not in counts


def benches(parts: Sequence[str], *, dry: bool) -> Iterator[list[dict[str, Any]]]:
    """The lines of every part, one after the other: they would disturb each other.

    A part has its share of the time, and what those before it left of theirs.
    """
    left = {name: DRY_S if dry else BENCH_S[name] for name in parts if name in BENCH_S}
    ends = time.monotonic() + sum(left.values())
    for part in list(left):
        began = time.monotonic()
        del left[part]
        lines = bench(part, ends - began - sum(left.values()), dry=dry)
        wrong = [line for line in lines if "error" in line]
        say(f"{part}: {len(lines)} lines, {len(wrong)} failed, {time.monotonic() - began:.0f} s")
        for line in wrong:
            say(f"{part}: {line.get('name')}: {line['error']}")
        yield lines


def place(folder: Path, facts: dict[str, Any]) -> Path:
    """A file for the record of this commit and day."""
    commit = str(facts["commit"]).replace("+", "-changed")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"gpu_{facts['date'][:10]}_{commit}.json"


def origin() -> dict[str, Any]:
    """What every record says about where its numbers come from, and the driver."""
    import torch
    import triton
    from bench_common import facts

    return facts(torch.device("cuda")) | {"triton": triton.__version__, "driver": driver()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*CHECKS, *BENCH_S)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all, or of {', '.join(parts)}")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with nothing timed")
    parser.add_argument("--json", action="store_true", help="no tables, the last line alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the record")
    found = parser.parse_args()
    if unknown := set(found.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    found.parts = found.parts or parts
    return found


def main() -> int:
    asked, began = options(), time.monotonic()
    dry, out = asked.dry_run, asked.out.absolute()
    os.chdir(ROOT)
    for end in (signal.SIGINT, signal.SIGTERM):  # a shell's "&" has the first ignored by all
        signal.signal(end, signal.default_int_handler)  # what was started here ends with it
    facts = {} if dry else origin()
    path = None if dry else place(out, facts)
    modules = kernel_modules(ROOT)
    found, lines = checks(modules, asked.parts, dry=dry), list[dict[str, Any]]()
    line = counted(modules, found)

    def note() -> None:
        """Write down what there is by now."""
        if path is None:
            return
        figures, reasons = measured(lines, asked.parts)
        line.update({"measured": figures, "reasons": reasons})
        seconds = time.monotonic() - began
        record = {"benchmark": "gpu", "seconds": seconds, "checks": found, "lines": lines}
        path.write_text(json.dumps(facts | record | line) + "\n")

    note()
    for more in benches(asked.parts, dry=dry):
        lines += more
        note()
    if path is not None:
        say(f"saved to {path}")
    if not asked.json:
        print(tables(lines))
    print(json.dumps(line))
    fine = right(modules, found) and not any("error" in x for x in lines)
    return int(not fine or bool(line.get("reasons")))


if __name__ == "__main__":
    sys.exit(main())
