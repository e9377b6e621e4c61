"""The part of a prompt whose KV the store already has, loaded ahead of the loop that needs it."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import Cache
from engine.model import Model
from engine.rope import RopeTable, Tables
from kvstore.block import BlockKey
from kvstore.layout import layer_groups
from kvstore.store import TieredStore

# Memory that blocks pass through, touched for the first time once, as far as there are blocks. So
# much that each of the store's four threads looks up several blocks before it copies them.
STAGING_BYTES = 32 << 20


class PrefixLost(Exception):
    """A block that was looked up could not be read; the blocks before it may still be there."""


class Prefix:
    """Loads stored blocks into a cache, one group of layers after the other, in a thread.

    The loop calls `wait(layer)` and finds that layer's keys rotated and in place, while later
    layers still load. Sets `cache.length`; the cache must be empty.
    """

    def __init__(
        self, model: Model, cache: Cache, store: TieredStore, keys: Sequence[BlockKey]
    ) -> None:
        assert cache.length == 0, "a prefix starts an empty cache"
        self._model, self._cache, self._store, self._keys = model, cache, store, keys
        cache.advance(sum(key.num_tokens for key in keys))
        self._tables = Tables(torch.arange(cache.length, device=model.shape.device))
        self._loads: dict[int, Future[None]] = {}
        # one thread of torch's: a second set would wait for the loop's cores (75 ms instead of 90)
        self._thread = ThreadPoolExecutor(1, "headrace-prefix", torch.set_num_threads, (1,))
        groups = layer_groups(model.shape.num_layers, self._layer_bytes)
        most = max(STAGING_BYTES, self._layer_bytes * max(map(len, groups)))
        self._staging = torch.empty(most // model.shape.dtype.itemsize, dtype=model.shape.dtype)
        for group in groups:
            self._loads |= dict.fromkeys(group, self._thread.submit(self._load, group))
        self._thread.shutdown(wait=False)

    def wait(self, layer: int) -> None:
        """Return when `layer` is in the cache. PrefixLost if a block of it is gone."""
        self._loads[layer].result()

    def cancel(self) -> None:
        """Stop loading; returns when nothing writes to the cache any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def _layer_bytes(self) -> int:
        """Of one layer of one block."""
        shape = self._model.shape
        return shape.kv_bytes_per_token // shape.num_layers * self._keys[0].num_tokens

    @torch.inference_mode()
    def _load(self, group: range) -> None:
        """Read some layers of every block, rotate the keys, and put them in place."""
        shape, tokens = self._model.shape, self._keys[0].num_tokens
        size = (len(group), 2, shape.num_kv_heads, tokens, shape.head_dim)
        at_once = self._staging.nbytes // (self._layer_bytes * len(group))
        for first in range(0, len(self._keys), at_once):
            keys = self._keys[first : first + at_once]
            staged = self._staging[: len(keys) * math.prod(size)].view(len(keys), *size)
            found = self._store.read_many(keys, group, staged)
            if lost := sum(not is_there for is_there in found):
                raise PrefixLost(f"{lost} stored blocks could not be read")
            self._place(group, first * tokens, staged)

    def _place(self, group: range, start: int, staged: Float[Tensor, "B n 2 Hk P D"]) -> None:
        """B blocks of layers `group` go to the tokens from `start` on."""
        data = staged.to(self._model.shape.device).permute(1, 2, 3, 0, 4, 5)  # n 2 Hk B P D
        for i, (k, v) in zip(group, data, strict=True):
            k, v, rope = k.flatten(1, 2), v.flatten(1, 2), self._model.layers[i].rope
            span = slice(start, start + k.shape[1])
            cos, sin = self._tables[rope]
            rotated = rope.rotate(k, RopeTable(cos[span], sin[span]))
            self._cache.write(i, start, rotated, v)
