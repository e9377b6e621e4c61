"""`headrace store bench`: how fast this disk is for the store, in a few seconds."""

import json
import os
import shutil
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from engine.commands.session import busy
from engine.errors import ConfigError
from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.known import BY_NAME
from kvstore.config import StoreConfig
from kvstore.disk.environment import files_of
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from kvstore.identity import ModelIdentity
from kvstore.store import TieredStore
from kvstore.tier import Item

MODEL = ModelIdentity(b"bench", (), "{}", "bfloat16", 32, 8, 128, "{}")  # KV as of Llama 3.1 8B
TOKENS = 64  # of a block of 8 MiB
TOKEN_BYTES = 128 << 10
TOGETHER = 8  # blocks put, and read, at once
SECONDS = 5.0  # after which no more is put


class Speeds(NamedTuple):
    """GB/s of numbers, verified: durable writes, reads from the device, and from memory."""

    put_gbps: float
    cold_get_gbps: float
    hot_get_gbps: float


def run(args: Namespace, path: Path, config: StoreConfig) -> int:
    """Put and get in a folder of its own beside the store, which goes again."""
    if args.mib < 1:
        raise ConfigError(f"--mib must be 1 or more, got {args.mib}")
    home = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    status = busy(f"measuring in {home}")
    with tempfile.TemporaryDirectory(dir=home, prefix="bench-") as folder, status:
        speeds = measured(Path(folder, "store"), args.mib << 20, config)
    if args.json:
        print(json.dumps({"path": str(home), "codec": config.codec} | speeds._asdict()))
        return 0
    per_s = speeds.cold_get_gbps * 1e9 / TOKEN_BYTES
    print(
        f"{home}, codec {config.codec}: put {speeds.put_gbps:.2f} GB/s, get "
        f"{speeds.cold_get_gbps:.2f} GB/s from the disk, {speeds.hot_get_gbps:.2f} from the page "
        "cache\n"
        f"A model with 128 KiB of KV per token (Llama 3.1 8B in bfloat16) gets {per_s:,.0f} tokens "
        "in a second from this disk: where its prefill is slower than that, stored KV is faster."
    )
    return 0


def measured(folder: Path, nbytes: int, config: StoreConfig) -> Speeds:
    """Speeds with `nbytes` of blocks, or as much as has room, or is put in some seconds."""
    nbytes = min(nbytes, shutil.disk_usage(folder.parent).free)
    nbytes = max(nbytes, TOGETHER * TOKENS * TOKEN_BYTES)  # a batch, at least
    tier = DiskTier(folder, 2 * nbytes, BY_NAME[config.codec])
    put, keys = _put(tier, _blocks(nbytes))
    tier.close()  # pages that are mapped cannot be dropped
    for file in files_of(folder):
        _drop(file)
    with TieredStore([DiskTier(folder, 2 * nbytes, BY_NAME[config.codec])]) as store:
        cold, hot = _get(store, keys), median(_get(store, keys) for _ in range(3))
    return Speeds(put, cold, hot)


def _blocks(nbytes: int) -> list[Item]:
    """Random numbers, which no codec makes smaller than KV is: the worst case."""
    count = nbytes // (TOKENS * TOKEN_BYTES)
    keys = BlockKey.chain(range(count * TOKENS), identity=MODEL, tenant=b"bench", size=TOKENS)
    blocks = [
        KVBlock(torch.randn(MODEL.block_shape(TOKENS), dtype=torch.bfloat16))
        for _ in range(TOGETHER)
    ]
    return [(key, blocks[i % TOGETHER]) for i, key in enumerate(keys)]


def _put(tier: DiskTier, items: list[Item]) -> tuple[float, list[BlockKey]]:
    """GB/s, and what is there now."""
    began, keys = time.perf_counter(), list[BlockKey]()
    for first in range(0, len(items), TOGETHER):
        batch = items[first : first + TOGETHER]
        tier.put(batch)
        keys += [key for key, _ in batch]
        if time.perf_counter() - began > SECONDS:
            break
    return _rate(len(keys), began), keys


def _get(store: TieredStore, keys: list[BlockKey]) -> float:
    """GB/s of whole blocks into memory that is used again."""
    out = torch.empty(TOGETHER, *MODEL.block_shape(TOKENS), dtype=torch.bfloat16)
    began = time.perf_counter()
    for first in range(0, len(keys), TOGETHER):
        part = keys[first : first + TOGETHER]
        if not all(store.read_many(part, range(MODEL.num_layers), out[: len(part)])):
            raise StoreError("blocks that were just put cannot be read: look at the disk's health")
    return _rate(len(keys), began)


def _rate(blocks: int, began: float) -> float:
    return blocks * TOKENS * TOKEN_BYTES / 1e9 / (time.perf_counter() - began)


def _drop(file: Path) -> None:
    """Have the next read come from the device."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
