"""`headrace store export` and `import`: blocks in one file."""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rich.filesize import decimal

from engine.commands.session import busy
from engine.errors import ConfigError
from kvstore.codecs.known import BY_NAME
from kvstore.config import StoreConfig
from kvstore.disk.entry import Entry
from kvstore.disk.portable import export, imported
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from kvstore.tier import Item

BATCH_BYTES = 64 << 20


def write(args: Namespace, path: Path, config: StoreConfig) -> int:
    """Blocks of all, or of a tenant or a model, to a file."""
    _check_hex(args)
    file = Path(args.file)
    if file.exists() and not file.is_file():  # /dev/null would be replaced
        raise ConfigError(f"FILE is where the blocks go, got a folder or device: {args.file}")
    tenant, model = args.tenant or "", args.identity or ""

    def chosen(entry: Entry) -> bool:
        key = entry.key
        return key.tenant.hex().startswith(tenant) and key.identity.hex().startswith(model)

    disk, status = _disk(path, config), busy(f"writing {args.file}")
    with closing(disk), status:
        done = export(disk, file, chosen)
    if args.json:
        print(json.dumps({"path": str(path), "file": args.file} | done._asdict()))
    else:
        print(f"{args.file}: {done.blocks:,} blocks, {decimal(done.nbytes)}")
        if done.damaged:
            print(f"{done.damaged:,} damaged ones left out: headrace store audit --repair")
        if done.gone:
            print(f"{done.gone:,} were evicted or deleted meanwhile")
    return 0 if not done.damaged else 1


def read(args: Namespace, path: Path, config: StoreConfig) -> int:
    """Blocks of a file, as far as they are whole; those that are there stay as they are."""
    counts = dict.fromkeys(("stored", "present", "skipped", "damaged"), 0)
    with open(args.file, "rb") as file, busy(f"reading {args.file}"):
        batches = _batches(imported(file))
        disk = _disk(path, config)
        with TieredStore([disk], policy=config.policy, quotas=config.quotas()) as store:
            for batch, damaged in batches:
                counts["damaged"] += damaged
                _put(store, disk, batch, counts)
    if args.json:
        print(json.dumps({"path": str(path), "file": args.file} | counts))
    else:
        print(f"{path}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))
        if counts["skipped"]:
            print("skipped: no room (raise disk_bytes or a quota), or the block before is missing")
    return 1 if counts["damaged"] else 0


def _disk(path: Path, config: StoreConfig) -> DiskTier:
    return DiskTier(path, config.disk_bytes, BY_NAME[config.codec])


def _put(store: TieredStore, disk: DiskTier, batch: list[Item], counts: dict[str, int]) -> None:
    keys = [key for key, _ in batch]
    before = disk.held(keys)
    store.put([item for item, there in zip(batch, before, strict=True) if not there])
    store.flush()
    stored = sum(disk.held(keys)) - sum(before)
    counts["present"] += sum(before)
    counts["stored"] += stored
    counts["skipped"] += len(keys) - sum(before) - stored


def _batches(blocks: Iterator[Item | None]) -> Iterator[tuple[list[Item], int]]:
    """Some blocks at a time, and how many between them were damaged."""
    batch: list[Item] = []
    damaged = nbytes = 0
    for item in blocks:
        if item is None:
            damaged += 1
            continue
        batch.append(item)
        nbytes += item[1].nbytes
        if nbytes >= BATCH_BYTES:
            yield batch, damaged
            batch, damaged, nbytes = [], 0, 0
    yield batch, damaged


def _check_hex(args: Namespace) -> None:
    for option, given in (("--tenant", args.tenant), ("--identity", args.identity)):
        if given and set(given) - set("0123456789abcdef"):
            raise ConfigError(f"{option} is the start of a name in hexadecimal, got {given!r}")
