"""Stored blocks, loaded to wherever a prompt has them, ahead of the loop that needs them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import Cache
from engine.model import Model, owners
from engine.rope import RopeTable, Tables
from kvstore.block import BlockKey, KVBlock
from kvstore.layout import layer_groups
from kvstore.store import TieredStore

# Memory that blocks pass through, touched for the first time once, as far as there are blocks. So
# much that each of the store's four threads looks up several blocks before it copies them.
STAGING_BYTES = 32 << 20


class BlocksLost(Exception):
    """Blocks that were looked up could not be read."""

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        super().__init__(f"{len(keys)} stored blocks could not be read")
        self.keys = keys


class Placed(NamedTuple):
    """A block, and the position of its first token in the prompt."""

    key: BlockKey
    start: int


class Loader:
    """Loads blocks into a cache, one group of layers after the other, in a thread.

    Keys rest unrotated, so a move is a rotation to the new place. `wait(layer)` returns when that
    layer's are there. Later blocks overwrite earlier ones where they overlap.

    Args:
        length: of the prompt, or of its start up to the last block.
        computed: blocks that need not be read.
        paced: read a group when the loop comes to the last layer before it, not at once: for loops
            that free a layer before they go on to the next, so that few of them are there.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        store: TieredStore,
        blocks: Sequence[Placed],
        length: int,
        computed: Mapping[BlockKey, KVBlock] | None = None,
        *,
        paced: bool = False,
    ) -> None:
        self._model, self._cache, self._store = model, cache, store
        self._owners = owners(model)
        self._computed = computed or {}
        self.tables = Tables(torch.arange(length, device=model.shape.device))
        self.load_s = self.waited_s = 0.0
        self._batches = list(self._stretches(blocks, self._at_once(blocks)))
        self._loads: dict[int, Future[None]] = {}
        # one thread of torch's: a second set would wait for the loop's cores (75 ms instead of 90)
        self._thread = ThreadPoolExecutor(1, "headrace-loader", torch.set_num_threads, (1,))
        self._left = iter(self._groups(blocks))
        self._at_a_time = 1 if paced else None
        self._submit()

    def wait(self, layer: int) -> None:
        """Return when `layer` is in the cache. BlocksLost if a block of it is gone."""
        start = time.perf_counter()
        self._loads[layer].result()
        self.waited_s += time.perf_counter() - start
        if layer + 1 not in self._loads:
            self._submit()

    # as a future of all layers, for loaders that are not paced

    def done(self) -> bool:
        """Whether all is there, or lost: `result` returns, or raises, at once."""
        return all(load.done() for load in self._loads.values())

    def result(self) -> None:
        """Return when all layers are in the cache. BlocksLost if a block is gone."""
        for layer in range(self._model.shape.num_layers):
            self.wait(layer)

    def add_done_callback(self, call: Callable[[Future[None]], object]) -> None:
        """Call from whatever thread, once `done`."""
        self._loads[max(self._loads)].add_done_callback(call)  # one thread loads them, in order

    def cancel(self) -> None:
        """Stop loading; returns when nothing writes to the cache any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        for group in islice(self._left, self._at_a_time):
            self._loads |= dict.fromkeys(group, self._thread.submit(self._load, group))

    def _layer_bytes(self, tokens: int) -> int:
        shape = self._model.shape
        return shape.kv_bytes_per_token // shape.num_layers * tokens

    def _groups(self, blocks: Sequence[Placed]) -> list[range]:
        size = max((block.key.num_tokens for block in blocks), default=1)
        return layer_groups(self._model.shape.num_layers, self._layer_bytes(size))

    def _at_once(self, blocks: Sequence[Placed]) -> int:
        """How many blocks pass through the staging memory together; makes it."""
        most = max((block.key.num_tokens for block in blocks), default=1)
        part = self._layer_bytes(most) * len(self._groups(blocks)[0])
        dtype = self._model.shape.dtype
        with torch.inference_mode(False):  # the store's threads write to it
            self._staging = torch.empty(max(STAGING_BYTES, part) // dtype.itemsize, dtype=dtype)
        return self._staging.nbytes // part

    @torch.inference_mode()
    def _load(self, group: range) -> None:
        """Read some layers of every block, rotate the keys, and put them in place."""
        began, lost = time.perf_counter(), list[BlockKey]()
        for batch in self._batches:
            staged = self._staging_of(batch, group)
            lost += self._read(batch, group, staged)
            if not lost:
                self._place(group, batch[0].start, staged)
        if lost:
            raise BlocksLost(lost)
        self.load_s += time.perf_counter() - began

    def _staging_of(self, batch: Sequence[Placed], group: range) -> Float[Tensor, "B n 2 Hk P D"]:
        """Room for some layers of blocks of one size, side by side."""
        shape, tokens = self._model.shape, batch[0].key.num_tokens
        size = torch.Size((len(batch), len(group), 2, shape.num_kv_heads, tokens, shape.head_dim))
        return self._staging[: size.numel()].view(size)

    def _read(
        self, batch: Sequence[Placed], group: range, out: Float[Tensor, "B n 2 Hk P D"]
    ) -> list[BlockKey]:
        """Fill `out`; the keys of what could not be read."""
        keys = [block.key for block in batch]
        if keys[0] in self._computed:
            layers = slice(group.start, group.stop)
            torch.stack([self._computed[key].data[layers] for key in keys], out=out)
            return []
        found = self._store.read_many(keys, group, out)
        return [key for key, is_there in zip(keys, found, strict=True) if not is_there]

    def _place(self, group: range, start: int, staged: Float[Tensor, "B n 2 Hk P D"]) -> None:
        """B blocks of layers `group` go to the tokens from `start` on."""
        data = staged.to(self._model.shape.device).permute(1, 2, 3, 0, 4, 5)  # n 2 Hk B P D
        span = slice(start, start + data.shape[3] * data.shape[4])
        recorder = self._cache.recorder
        for i, (k, v) in zip(group, data, strict=True):
            k, v, rope = k.flatten(1, 2), v.flatten(1, 2), self._owners[i].rope
            cos, sin = self.tables[rope]
            self._cache.write(i, start, rope.rotate(k, RopeTable(cos[span], sin[span])), v)
            if recorder is not None:
                recorder.write(i, start, k, v)

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
