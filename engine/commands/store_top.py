"""`headrace store top`: what a running server's tiers do, or what a store folder holds, live."""

import http.client
import json
import os
import time
import urllib.error
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import msgspec
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table

from engine.commands.asking import KEY_VARIABLE, said
from engine.errors import ConfigError, EngineError
from engine.serve.report import StatusReport, Tier
from kvstore.codecs.known import BY_NAME
from kvstore.config import StoreConfig
from kvstore.disk.sound import DATA_FILE
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from kvstore.summary import rows

TIMEOUT_S = 10.0
LONGEST_S = 86400.0  # between two looks
Look: TypeAlias = Callable[[], RenderableType]
TIER_COLUMNS = (
    "tier", "used", "of", "blocks", "hits", "evicted", "refused", "skipped", "corrupt",
)  # fmt: skip
COLUMNS = ("tenant", "class", "codec", "blocks", "bytes")


def run(args: Namespace, path: Path, config: StoreConfig) -> int:
    """Look again and again until Ctrl-C, or once; with --json, once and all of it."""
    if not 0 < args.interval <= LONGEST_S:
        raise ConfigError(
            f"--interval must be more than 0 seconds and at most {LONGEST_S:g}, got {args.interval}"
        )
    if args.url is not None and args.json:
        print(msgspec.json.encode(_fetch(args.url, args.key).tiers).decode())
        return 0
    if args.url is not None:
        return watch(args, lambda: of_server(args.url, args.key))
    if not (path / DATA_FILE).exists():
        raise StoreError(f"there is no store at {path}: give --store, or a server's --url")
    with closing(DiskTier(path, config.disk_bytes, BY_NAME[config.codec])) as tier:
        if args.json:
            print(json.dumps({"path": str(path), "groups": rows(tier.groups())}))
            return 0
        return watch(args, lambda: of_folder(path, tier))


def watch(args: Namespace, look: Look) -> int:
    """Show what `look` sees."""
    console = Console(highlight=False, markup=False, width=None if os.isatty(1) else 120)
    if args.once:
        console.print(look())
        return 0
    with Live(look(), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            time.sleep(args.interval)
            live.update(look(), refresh=True)


def of_folder(path: Path, tier: DiskTier) -> RenderableType:
    """What is in a store, whoever writes to it."""
    used = f"{decimal(tier.used_bytes)} of {decimal(tier.capacity_bytes)} used"
    return Group(f"{path}: {used}", owners([list(row.values()) for row in rows(tier.groups())]))


def of_server(url: str, key: str | None) -> RenderableType:
    """What the tiers of a server hold, and how often they help."""
    report = _fetch(url, key)
    table = Table(box=None, header_style="bright_black", pad_edge=False)
    for name in TIER_COLUMNS:
        table.add_column(name, justify="left" if name == "tier" else "right")
    for tier in report.tiers:
        table.add_row(tier.name, *_cells(tier))
    owned: list[list[str | int]] = [
        [f"{tier.name}: {x.tenant}", x.kind, x.codec, x.blocks, x.bytes]
        for tier in report.tiers
        for x in tier.groups
    ]
    said = (
        f"{report.model} at {url}: {decimal(report.queued_bytes)} wait to be written, "
        f"{report.pinned_blocks:,} blocks pinned, the oldest pin {report.oldest_pin_s:.0f} s old, "
        f"{report.expired_pins:,} not released in time"
    )
    return Group(said, table, owners(owned))


def _cells(tier: Tier) -> list[str]:
    ratio = "-" if tier.hit_ratio is None else f"{tier.hit_ratio:.1%}"
    counts = (tier.evictions, tier.refused, tier.skipped, tier.corrupt)
    sizes = decimal(tier.used_bytes), decimal(tier.capacity_bytes)
    return [*sizes, f"{tier.blocks:,}", ratio, *(f"{count:,}" for count in counts)]


def owners(owned: Sequence[Sequence[str | int]]) -> Table:
    """Who has how much."""
    table = Table(box=None, header_style="bright_black", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("blocks", "bytes") else "left")
    for tenant, kind, codec, blocks, nbytes in owned:
        table.add_row(str(tenant), str(kind), str(codec), f"{blocks:,}", decimal(int(nbytes)))
    return table


def _fetch(url: str, key: str | None) -> StatusReport:
    try:
        return msgspec.json.decode(said(url, "stats", key, TIMEOUT_S), type=StatusReport)
    except urllib.error.HTTPError as error:
        with error:
            raise EngineError(
                f"{url} answers {error.code} {error.reason}: its numbers need a key that sees all "
                f"(--key, or ${KEY_VARIABLE})"
            ) from error
    except msgspec.DecodeError as error:
        raise EngineError(f"{url} does not answer as headrace does: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(
            f"no server at {url} ({getattr(error, 'reason', error)}): start one with headrace "
            "serve, or leave --url out to look at the store's folder"
        ) from error
