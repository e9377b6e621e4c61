#!/usr/bin/env python3
"""What a GPU makes of it: kernels, decode, prefill, blending, copies, codebooks.

    python scripts/bench_gpu.py [PART...] [--short] [--dry-run] [--json] [--save]

    kernels   every kernel against its definition, then its time and bytes at 128k tokens
    decode    the Llama-3.1-8B shape, dense and sparse, at given shares of hits
    copies    the share of a decode step that copies from host memory add, at 64k tokens
    prefill   128k tokens, dense and with indexes, factors and offload
    blend     ten reused chunks of 2k tokens in a new order
    codebook  training, by FAISS

Weights and KV are random, made on the device: nothing is downloaded. Each measurement is printed
as one JSON line as soon as it is there (to stderr without --json, which is for programs), so that
what a run has measured survives its end. --dry-run goes through all of it on a CPU, at toy sizes,
and times nothing.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_common import facts, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GIB = 1 << 30
CAP_BYTES = 40 * GIB  # of device memory in decode: a card of 141 GB holds what host memory does
HOST_BYTES = 113 * GIB  # of KV in host memory, of 128 that a machine has: seven times 128k tokens
FULL_LAYERS, FEW_LAYERS = 32, 8  # FEW where time is the layers' alone and comparison is what counts
Lines = Iterator[dict[str, Any]]


@dataclass
class Run:
    """What the parts share; made when the first of them asks for it."""

    device: torch.device
    short: bool
    cap_bytes: int | None
    host_bytes: int
    only: str
    skip: frozenset[str]
    small: bool

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @cached_property
    def limits(self) -> Any:
        from gpu_bench.timing import ceilings, free_memory

        found = ceilings(self.device)
        free_memory()
        return found

    def module(self, layers: int) -> Any:
        from gpu_bench.llama import llama

        return llama(self.device, layers)

    def kernels(self) -> Lines:
        from gpu_bench import kernels

        names = [name for name in kernels.CASES if self.only in name and name not in self.skip]
        if self.small:
            return kernels.checked_only(self.device, names)
        return kernels.lines(self.device, names, self.limits, rounds=self.rounds(21, 7))

    def decode(self) -> Lines:
        from gpu_bench import decode

        plan = decode.TOY if self.dry else decode.SHORT if self.short else decode.FULL
        return decode.lines(self._place(), plan)

    def copies(self) -> Lines:
        from gpu_bench import decode

        return decode.copies(self._place(), *((1024, 2) if self.dry else (1 << 16, 8)))

    def _place(self) -> Any:
        from gpu_bench.decode import Place

        module = self.module(FULL_LAYERS)
        return Place(module, self.limits, self.cap_bytes, self.host_bytes)

    def prefill(self) -> Lines:
        from gpu_bench import prefill

        module = self.module(FEW_LAYERS if self.short else FULL_LAYERS)
        return prefill.lines(module, 256 if self.dry else 1 << 17, self.rounds(3, 1))

    def blend(self) -> Lines:
        from gpu_bench import blend

        module = self.module(FEW_LAYERS if self.short else FULL_LAYERS)
        chunks, tokens = (3, 64) if self.dry else (10, 2048)
        return blend.lines(module, chunks, tokens, self.rounds(5, 3))

    def codebook(self) -> Lines:
        from gpu_bench import training

        return training.lines(self.device)

    def rounds(self, full: int, short: int) -> int:
        return 1 if self.dry else short if self.short else full


PARTS = ("kernels", "decode", "copies", "prefill", "blend", "codebook")


def lines(run: Run, part: str) -> Lines:
    """What a part measures; what ends it is its last line."""
    measure: Callable[[], Lines] = getattr(run, part)
    try:
        with torch.no_grad():
            yield from measure()
    except Exception as error:
        traceback.print_exc()
        said = "".join(traceback.format_exception_only(error)).strip()[:500]
        yield {"part": part, "name": "all", "error": said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout, no table")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--short", action="store_true", help="what matters most, within minutes")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, no times")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--skip", nargs="+", default=[], help="kernels to leave out, by name")
    parser.add_argument("--small", action="store_true", help="kernels: toy sizes, checks alone")
    parser.add_argument("--cap-gib", type=float, default=CAP_BYTES / GIB, help="0: the whole card")
    parser.add_argument("--host-gib", type=float, default=HOST_BYTES / GIB)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --dry-run goes through all of it on a CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    cap = int(options.cap_gib * GIB) or None
    chosen = options.only, frozenset(options.skip), options.small
    run = Run(device, options.short, cap, int(options.host_gib * GIB), *chosen)
    measured = []
    for part in options.parts or PARTS:
        for line in lines(run, part):
            print(json.dumps(line), file=sys.stdout if options.json else sys.stderr, flush=True)
            measured.append(line)
    record = facts(device) | {"benchmark": "gpu", "lines": measured}
    if options.save:
        print(f"saved to {save('gpu_bench', record)}", file=sys.stderr)
    if not options.json:
        from gpu_bench.table import tables

        print(tables(measured))
    return int(any("error" in line for line in measured))


if __name__ == "__main__":
    sys.exit(main())
