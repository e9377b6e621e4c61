"""Faults put into stores: kills, damaged bytes, broken disks, lost folders, bad servers.

    scripts/faults [--scale X] [--only NAME ..] [--json] [--save] [--folder PATH]

Runs the campaigns of tests/kvstore/faults, two at a time, and counts what came of them. Fails (exit
1) where one served wrong KV, lost what was acknowledged, stalled, or ended as it may not.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_common import facts, save
from faulting.table import BAD, CAMPAIGNS
from rich.console import Console
from rich.table import Table

from tests.kvstore.faults.run import found_by

CONSOLE = Console(stderr=True, soft_wrap=True)
AT_ONCE = 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--scale", type=float, default=1.0, help="of the rounds (%(default)s)")
    made.add_argument(
        "--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), metavar="NAME",
        help=", ".join(CAMPAIGNS),
    )  # fmt: skip
    made.add_argument("--folder", type=Path, help="on the disk to be used (a temporary one)")
    made.add_argument("--json", action="store_true", help="end with one JSON line")
    made.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    made.add_argument("--seed", type=int, default=1)
    return made


def main() -> int:
    options = parser().parse_args()
    record = facts(torch.device("cpu")) | {"benchmark": "faults", "scale": options.scale}
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.folder) as folder:
        record["campaigns"] = campaigns(options, Path(folder))
    if options.save:
        CONSOLE.print(f"saved to {save('faults', record)}")
    if options.json:
        print(json.dumps(record), flush=True)
    else:
        Console().print(table(record["campaigns"]))
    for name, found in record["campaigns"].items():
        for reason in found["reasons"]:
            CONSOLE.print(f"{name}: {reason}", style="red", markup=False)
    return 0 if all(found["is_right"] for found in record["campaigns"].values()) else 1


def campaigns(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What each found, by name."""

    def run(name: str) -> dict[str, Any]:
        rounds = max(1, round(options.scale * CAMPAIGNS[name].rounds))
        here = folder / name
        here.mkdir()
        [found] = found_by([name], here, rounds, options.seed).values()
        CONSOLE.print(f"{name}: {found['rounds']} rounds in {found['seconds']} s")
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(options.only, pool.map(run, options.only), strict=True))


def table(found: dict[str, Any]) -> Table:
    made = Table("campaign", "what", "rounds", *BAD, "s", box=None)
    for name, each in found.items():
        bad = [f"[red]{each[x]}[/]" if each[x] else "0" for x in BAD]
        about = CAMPAIGNS[name].about
        made.add_row(name, about, f"{each['rounds']:,}", *bad, f"{each['seconds']:.0f}")
    return made


if __name__ == "__main__":
    sys.exit(main())
