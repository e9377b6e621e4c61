#!/usr/bin/env python3
"""What every kernel needs of a GPU once compiled: registers, shared memory, spills. Needs no GPU.

    python scripts/bench_aot.py [--save]

Nothing is timed: how many programs fit on a multiprocessor, and whether one keeps its numbers in
registers, is known before it runs.
"""

import argparse
import json

import torch
from bench_common import ROOT, facts, save

from native.gpu import ARCHES, kernel_modules, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    options = parser.parse_args()
    import triton

    found = report(kernel_modules(ROOT), ARCHES)
    builds = {name: made for at in found.values() for name, made in at.items()}
    record = facts(torch.device("cpu")) | {"triton": triton.__version__, "builds": builds}
    if options.save:
        save("aot", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
