"""Ways to keep values on disk, all with the same interface, for bench_store.

A side puts batches, each durable when it is acknowledged, and gets values by their numbers.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np
import torch

from kvstore import record
from kvstore.block import BlockKey
from kvstore.codecs.codec import byte_view
from kvstore.codecs.known import RAW
from kvstore.disk.environment import files_of
from kvstore.disk.extent import MAP_BYTES
from kvstore.disk.tier import DiskTier
from kvstore.identity import ModelIdentity
from kvstore.layout import layer_groups
from kvstore.tier import Item

MODEL = ModelIdentity(b"bench", (), "{}", "bfloat16", 32, 8, 128, "{}")
SIZE = 64
GROUPS = layer_groups(32, 2 * 8 * 128 * SIZE * 2)
VALUE = 2 << 20
TOGETHER = 4  # blocks of which a thread gets a value each: 8 MiB
PAGE = 4096


class Side(Protocol):
    """One way. `close` forgets the page cache of `paths` only if they are dropped as well."""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def put(self, batch: Sequence[Item]) -> None: ...
    def get(self, values: Sequence[int]) -> None: ...
    def paths(self) -> list[Path]: ...


def recycled(count: int) -> torch.Tensor:
    """Values to get into, page-aligned, in memory that was used before."""
    memory = np.empty(count * VALUE + PAGE, np.uint8)
    memory.fill(0)
    start = -memory.ctypes.data % PAGE
    flat = torch.from_numpy(memory[start : start + count * VALUE]).view(torch.bfloat16)
    return flat.view(count, len(GROUPS[0]), *MODEL.block_shape(SIZE)[1:])


class Tier:
    """The disk tier as it is: cached values out of their map, others by O_DIRECT, verified."""

    def __init__(self, folder: Path, keys: Sequence[BlockKey]) -> None:
        self.folder, self.keys = folder / "store", keys

    def open(self) -> None:
        self.tier = DiskTier(self.folder, 2 * len(self.keys) * len(GROUPS) * VALUE)

    def close(self) -> None:
        self.tier.close()

    def put(self, batch: Sequence[Item]) -> None:
        self.tier.put(batch)

    def get(self, values: Sequence[int]) -> None:
        """One group of layers of some blocks at a time, as the engine loads a prefix."""
        out = recycled(TOGETHER)
        for number, group in enumerate(GROUPS):
            keys = [self.keys[i // len(GROUPS)] for i in values if i % len(GROUPS) == number]
            for first in range(0, len(keys), TOGETHER):
                some = keys[first : first + TOGETHER]
                assert all(self.tier.read_many(some, group, out[: len(some)]))

    def get_singly(self, values: Sequence[int], kept: list[torch.Tensor] | None = None) -> None:
        """One value at a time, into the same memory or each into its own."""
        out = recycled(1)[0]
        for i in values:
            key, group = self.keys[i // len(GROUPS)], GROUPS[i % len(GROUPS)]
            data = self.tier.read(key, group, out if kept is None else None)
            assert data is not None
            if kept is not None:
                kept.append(data)

    def paths(self) -> list[Path]:
        return files_of(self.folder)


class Buffered(Tier):
    """The same through the page cache alone, by preadv."""

    def open(self) -> None:
        super().open()
        ways = self.tier.access.env.ways
        ways.close()
        ways._mapped_at = 0


class Files:
    """Plain files: no checksums, no index, not verified."""

    def __init__(self, folder: Path, keys: Sequence[BlockKey]) -> None:
        self.folder, self.keys = folder / "files", keys
        self.folder.mkdir()

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def put(self, batch: Sequence[Item]) -> None:
        written = []
        for key, block in batch:
            for number, layers in enumerate(GROUPS):
                handle = os.open(self._name(key, number), os.O_CREAT | os.O_WRONLY, 0o600)
                os.write(handle, byte_view(block.data[layers.start : layers.stop]).data)
                written.append(handle)
        for handle in written:
            os.fsync(handle)
            os.close(handle)
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def get(self, values: Sequence[int]) -> None:
        out = byte_view(recycled(1))
        for i in values:
            name = self._name(self.keys[i // len(GROUPS)], i % len(GROUPS))
            handle = os.open(name, os.O_RDONLY)
            assert os.preadv(handle, [out], 0) == VALUE
            os.close(handle)

    def paths(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def _name(self, key: BlockKey, number: int) -> Path:
        return self.folder / f"{key.digest.hex()}.{number}"


class Inline:
    """Values in LMDB itself: a transaction for each batch; read through its map, and verified."""

    def __init__(self, folder: Path, keys: Sequence[BlockKey]) -> None:
        self.folder, self.keys = folder / "inline", keys

    def open(self) -> None:
        self.lmdb = lmdb.open(str(self.folder), map_size=MAP_BYTES)  # the kernel reads ahead

    def close(self) -> None:
        self.lmdb.close()

    def put(self, batch: Sequence[Item]) -> None:
        with self.lmdb.begin(write=True) as txn:
            for key, block in batch:
                for number, layers in enumerate(GROUPS):
                    data = block.data[layers.start : layers.stop]
                    txn.put(self._name(key, number), record.encode(key, data, layers, 32, RAW))

    def get(self, values: Sequence[int]) -> None:
        out = recycled(1)[0]
        for i in values:
            key, number = self.keys[i // len(GROUPS)], i % len(GROUPS)
            with self.lmdb.begin(buffers=True) as txn:
                value = memoryview(txn.get(self._name(key, number), b""))
                record.decode_into(out, value, key, GROUPS[number], 32)

    def paths(self) -> list[Path]:
        return [self.folder / "data.mdb"]

    def _name(self, key: BlockKey, number: int) -> bytes:
        return key.digest + bytes([number])


class Raw:
    """O_DIRECT reads of the tier's payloads, and nothing else."""

    def __init__(self, folder: Path, keys: Sequence[BlockKey]) -> None:
        self.tier = Tier(folder, keys)

    def open(self) -> None:
        self.tier.open()
        access = self.tier.tier.access
        with access.reading() as txn:
            entries = [access.ledger.sound(txn, key.digest) for key in self.tier.keys]
        self.places = [(page + 1) * PAGE for entry in entries if entry for page in entry.pages]
        values = access.env.values
        self.handle = os.open(values.path, os.O_RDONLY | os.O_DIRECT)

    def close(self) -> None:
        os.close(self.handle)
        self.tier.close()

    def put(self, batch: Sequence[Item]) -> None:
        raise NotImplementedError("it reads what the tier has put")

    def get(self, values: Sequence[int]) -> None:
        out = byte_view(recycled(1))
        for i in values:
            assert os.preadv(self.handle, [out], self.places[i]) == VALUE

    def paths(self) -> list[Path]:
        return self.tier.paths()
