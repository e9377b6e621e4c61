"""Memory that stored blocks pass through on their way to a cache."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from engine.model.pieces import Shape
from kvstore.block import BlockKey, KVBlock
from kvstore.layout import layer_groups
from kvstore.store import TieredStore
from native.pages import own_large_pages
from native.threads import be_patient, use_one_core

AHEAD = 2  # batches that are read at a time: with one the disk would wait for who takes them
STAGING_BYTES = 48 << 20  # of these and the one that is taken; touched as far as there are blocks


def modest() -> None:
    """One thread of torch's: a second set would wait for the loop's cores (75 ms instead of 90)."""
    use_one_core()
    be_patient()


class Placed(NamedTuple):
    """A block, and the position of its first token in the prompt."""

    key: BlockKey
    start: int


class Staged(NamedTuple):
    """Some layers of blocks that follow each other, valid until the next is taken."""

    group: range
    start: int
    data: Float[Tensor, "B n 2 Hk P D"]
    lost: list[BlockKey]  # what could not be read, and is undefined


class Busy:
    """The time in which at least one of several threads was at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._since, self.seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._since = time.perf_counter()
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self.seconds += time.perf_counter() - self._since


class Staging:
    """Some layers of some blocks at a time: these are taken while the next ones are read.

    Args:
        computed: blocks that need not be read.
        busy: while something is read.
    """

    def __init__(
        self,
        shape: Shape,
        store: TieredStore,
        blocks: Sequence[Placed],
        computed: Mapping[BlockKey, KVBlock],
        busy: Busy,
    ) -> None:
        self._shape, self._store, self._computed, self._busy = shape, store, computed, busy
        most = max((block.key.num_tokens for block in blocks), default=1)
        self.groups = layer_groups(shape.num_layers, self._layer_bytes(most))
        part = self._layer_bytes(most) * len(self.groups[0])
        room = max(STAGING_BYTES // (AHEAD + 1), part)
        numbers = room // shape.dtype.itemsize
        self._rooms = deque(_room(numbers, shape) for _ in range(AHEAD + 1))
        self.batches = list(self._stretches(blocks, room // part))
        self._left = product(self.groups, self.batches)
        self._threads = ThreadPoolExecutor(AHEAD, "headrace-staging", modest)
        self._ahead = deque[Future[Staged]]()
        for _ in range(AHEAD):
            self._read_on()

    def take(self) -> Staged:
        """The next batch, of the first group of layers, then of the next one, and so on.

        What a read raises, this and every later call do.
        """
        staged = self._ahead[0].result()
        self._ahead.popleft()
        self._read_on()
        return staged

    def close(self) -> None:
        """Stop; returns when no read is waited for, and gives the memory back as soon as it can."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._rooms.clear()
        self._ahead.clear()

    def _read_on(self) -> None:
        """Begin with the next batch, where the one was that nobody needs any more."""
        step = next(self._left, None)
        if step is not None:
            self._ahead.append(self._threads.submit(self._read, *step, self._rooms[0]))
            self._rooms.rotate(-1)

    @torch.inference_mode()
    def _read(self, group: range, batch: Sequence[Placed], room: Float[Tensor, " _"]) -> Staged:
        keys, shape, tokens = [block.key for block in batch], self._shape, batch[0].key.num_tokens
        size = torch.Size((len(batch), len(group), 2, shape.num_kv_heads, tokens, shape.head_dim))
        out = room[: size.numel()].view(size)
        lost: list[BlockKey] = []
        with self._busy:
            if keys[0] in self._computed:
                layers = slice(group.start, group.stop)
                torch.stack([self._computed[key].data[layers] for key in keys], out=out)
            else:
                found = self._store.read_many(keys, group, out)
                lost = [key for key, is_there in zip(keys, found, strict=True) if not is_there]
        return Staged(group, batch[0].start, out, lost)

    def _layer_bytes(self, tokens: int) -> int:
        return self._shape.kv_bytes_per_token // self._shape.num_layers * tokens

    def _stretches(self, blocks: Sequence[Placed], most: int) -> Iterator[list[Placed]]:
        """Runs of at most `most` blocks that follow each other and are read in the same way."""
        run: list[Placed] = []
        for block in blocks:
            if run and (len(run) == most or not self._follows(run[-1], block)):
                yield run
                run = []
            run.append(block)
        if run:
            yield run

    def _follows(self, last: Placed, block: Placed) -> bool:
        near = block.start == last.start + last.key.num_tokens
        same = (last.key in self._computed) == (block.key in self._computed)
        return near and same and last.key.num_tokens == block.key.num_tokens


def _room(numbers: int, shape: Shape) -> Float[Tensor, " numbers"]:
    """Memory that is copied from: page-locked for a GPU, by torch, which keeps it for the next."""
    if shape.device.type == "cuda":
        with torch.inference_mode(False):  # the store's threads, which write to it, are not in it
            return torch.empty(numbers, dtype=shape.dtype, pin_memory=True)
    return own_large_pages((numbers,), shape.dtype)
