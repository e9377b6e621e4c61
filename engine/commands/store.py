"""`headrace store`: look after the KV on disk."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from engine.commands import store_bench, store_files, store_top
from engine.commands.session import busy, engine_config
from engine.commands.store_top import owners
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.rag.catalogue import catalogues, discard
from kvstore.config import StoreConfig
from kvstore.disk.compact import compact
from kvstore.disk.environment import files_bytes
from kvstore.disk.tables import check_tables
from kvstore.errors import StoreError
from kvstore.store import TieredStore
from kvstore.summary import rows


def run(args: Namespace) -> int:
    config = engine_config(args)
    if args.action in OTHERS:
        return OTHERS[args.action](args, Path(str(config.store.disk_path)), config.store)
    path, store = open_disk(config, check=args.action == "audit")
    with store:
        return {"stat": _stat, "audit": _audit, "clear": _clear}[args.action](args, path, store)


def open_disk(config: EngineConfig, *, check: bool = False) -> tuple[Path, TieredStore]:
    """The disk tier alone. StoreError where there is none: looking must not create one.

    `check`: walk all tables first, in a process of its own, which damaged ones may end.
    """
    path = Path(str(config.store.disk_path))
    _check_there(path)
    if check:
        check_tables(path)
    only_disk = StoreConfig(host_bytes=0, disk_path=str(path), disk_bytes=config.store.disk_bytes)
    return path, TieredStore.open(only_disk)


def _compact(args: Namespace, path: Path, _: StoreConfig) -> int:
    _check_there(path)
    with busy(f"compacting {path}"):
        before, after = compact(path)
    if args.json:
        print(json.dumps({"path": str(path), "before_bytes": before, "after_bytes": after}))
    else:
        print(f"{path}: {decimal(before)} before, {decimal(after)} now")
    return 0


def _check_there(path: Path) -> None:
    if not path.exists():
        raise StoreError(f"there is no store at {path}: nothing was stored yet, or give --store")
    if path.is_dir() and not (path / "data.mdb").exists():
        raise StoreError(f"{path} holds no store: give the folder of one with --store")


def _export(args: Namespace, path: Path, config: StoreConfig) -> int:
    _check_there(path)
    return store_files.write(args, path, config)


def _stat(args: Namespace, path: Path, store: TieredStore) -> int:
    tier, aged = store.stats().tiers["disk"], store.ages()
    file_bytes = files_bytes(path)
    if args.json:
        numbers = {"path": str(path), "blocks": tier.blocks, "used_bytes": tier.used_bytes}
        numbers |= {"capacity_bytes": tier.capacity_bytes, "file_bytes": file_bytes}
        numbers |= {"ages": None if aged is None else aged._asdict(), "groups": rows(tier.groups)}
        print(json.dumps(numbers))
        return 0
    print(
        f"{path}: {tier.blocks:,} blocks, {decimal(tier.used_bytes)} of "
        f"{decimal(tier.capacity_bytes)} used, {decimal(file_bytes)} on disk"
    )
    if aged is not None:
        print(
            f"last used {_ago(aged.youngest_s)} ago, half of them within {_ago(aged.median_s)}, "
            f"all within {_ago(aged.oldest_s)}"
        )
        Console(highlight=False).print(owners([list(row.values()) for row in rows(tier.groups)]))
    return 0


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _audit(args: Namespace, path: Path, store: TieredStore) -> int:
    with busy(f"verifying {path}"):
        report = store.audit(repair=args.repair)
    if args.json:
        print(json.dumps({"path": str(path), "clean": report.clean} | asdict(report)))
    else:
        print(f"{path}: {report.blocks:,} sound blocks of {decimal(report.nbytes)}")
        print(*report.problems, sep="\n", end="\n" if report.problems else "")
        if report.problems:
            print(
                "repaired" if report.repaired else "repair it with: headrace store audit --repair"
            )
    return 0 if report.clean or report.repaired else 1


def _clear(args: Namespace, path: Path, store: TieredStore) -> int:
    tier, texts = store.stats().tiers["disk"], catalogues(path)
    if not args.yes:
        what = f"{tier.blocks:,} blocks ({decimal(tier.used_bytes)})"
        what += f" and {len(texts)} catalogues of documents" if args.documents else ""
        _confirm(f"delete {what} in {path}? [y/N] ")
    store.clear()
    gone = texts if args.documents else []
    for catalogue in gone:
        discard(catalogue)
    if args.json:
        numbers = {"path": str(path), "blocks": tier.blocks, "bytes": tier.used_bytes}
        print(json.dumps(numbers | {"catalogues": len(gone)}))
        return 0
    print(f"{path}: {tier.blocks:,} blocks deleted" + f", {len(gone)} catalogues" * bool(gone))
    if texts and not gone:
        print(f"documents are still on record with their texts: {len(texts)} catalogues, which")
        print("headrace store clear --documents deletes, or headrace rag delete one by one")
    return 0


OTHERS = {  # what opens the disk tier as it needs it
    "export": _export,
    "import": store_files.read,
    "bench": store_bench.run,
    "compact": _compact,
    "top": store_top.run,
}


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("store clear deletes all blocks: confirm with --yes")
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was deleted")
