"""`headrace-eval traces`: hit rates of the store's eviction policies on recorded requests."""

import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.errors import ConfigError
from evals.traces.read import read_traces
from evals.traces.table import OPTIMUM, Rate, Rates, by_policy, measure, outcome
from kvstore.admission import AdmissionName
from kvstore.eviction import POLICIES

CAPACITIES = (1000, 3000, 10000, 30000, 100000)


def add(parser: ArgumentParser) -> None:
    """The command's options."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--trace", metavar="FILE", type=Path,
        help="one trace; with one policy and one capacity, --json ends with a line of just "
        "hit_rate, hit_rate_without_shared and accesses",
    )  # fmt: skip
    where.add_argument(
        "--data", metavar="DIR", type=Path,
        help="a trace, or a folder with some: .jsonl or .jsonl.gz, in Mooncake's format (hash_ids) "
        "or as agentic sessions (s, i, t, n, p, k) ($HEADRACE_DATA/traces)",
    )  # fmt: skip
    parser.add_argument(
        "--capacity", metavar="N", type=_blocks, nargs="+", default=CAPACITIES,
        help="blocks that there is room for, as 3000 or 3k "
        f"({' '.join(f'{x // 1000}k' for x in CAPACITIES)})",
    )  # fmt: skip
    parser.add_argument(
        "--policy", metavar="NAME", nargs="+", default=tuple(POLICIES),
        help=f"{', '.join(POLICIES)}, and {OPTIMUM}, the best that there can be, which is always "
        "shown (all)",
    )  # fmt: skip
    parser.add_argument(
        "--admission", choices=get_args(AdmissionName), default="always",
        help="what comes in: all, or once something would have to go, what is seen again "
        "(%(default)s)",
    )  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N requests")
    parser.add_argument("--json", action="store_true", help="a JSON line for each trace")


def _blocks(text: str) -> int:
    found = re.fullmatch(r"(\d+)(k?)", text.lower())
    if found is None:
        raise ArgumentTypeError(f"blocks are a number, like 3000 or 3k; got {text}")
    return int(found[1]) * (1000 if found[2] else 1)


def run(args: Namespace) -> int:
    """Replay and print, a trace at a time."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be 1 request or more, got {args.limit}")
    from engine.commands.session import busy

    console = Console(highlight=False)
    names = [name for policy in args.policy for name in policy.split(",") if name]
    policies, capacities = list(dict.fromkeys(names)), sorted(set(args.capacity))
    for trace in read_traces(args.trace or args.data or _data(), args.limit):
        with busy(f"replaying {trace.name}"):
            rates = measure(trace, policies, capacities, args.admission)
        if args.json:
            print(msgspec.json.encode(rates).decode(), flush=True)
            if args.trace and len(policies) == len(capacities) == 1:
                print(msgspec.json.encode(outcome(rates, policies[0])).decode(), flush=True)
        else:
            _print(console, rates)
    return 0


def _data() -> Path:
    folder = os.environ.get("HEADRACE_DATA")
    if not folder:
        raise ConfigError(
            "there are no traces: give --trace FILE or --data DIR, or set HEADRACE_DATA"
        )
    return Path(folder, "traces")


def _print(console: Console, rates: Rates) -> None:
    said = (
        f": {rates.requests:,} requests, {rates.blocks:,} blocks, "
        f"{rates.distinct:,} of them different, the first {rates.shared:,} of every request"
    )
    console.print(Text.assemble((rates.trace, "bold"), said))
    table = Table(box=None, pad_edge=False)
    table.add_column("hit rate, %")
    for rate in by_policy(rates)[OPTIMUM]:
        room = "all" if rate.capacity is None else f"{rate.capacity:,}"
        table.add_column(room, justify="right")
    _add_rows(table, rates, "", lambda rate: rate.hit_rate)
    if rates.shared:
        _add_rows(table, rates, ", without shared", lambda rate: rate.hit_rate_unshared)
    console.print(table)
    console.print(_written(rates))
    console.print()


def _written(rates: Rates) -> Table:
    """How much each policy stored: what a disk wears by."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"stored ({rates.admission}), blocks")
    rows = {name: row for name, row in by_policy(rates).items() if name != OPTIMUM}
    for rate in next(iter(rows.values()), ()):
        table.add_column(f"{rate.capacity:,}", justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{rate.stored:,}" for rate in row))
    return table


def _add_rows(table: Table, rates: Rates, note: str, value: Callable[[Rate], float | None]) -> None:
    for name, row in by_policy(rates).items():
        cells = ["-" if (x := value(rate)) is None else f"{100 * x:.2f}" for rate in row]
        table.add_row(name + note, *cells, style="dim" if name == OPTIMUM else "")
