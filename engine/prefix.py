"""The part of a prompt whose KV the store already has, loaded ahead of the loop that needs it."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from engine.cache import SequenceCache
from engine.model import Model
from engine.rope import RopeTable, Tables
from kvstore.block import BlockKey
from kvstore.layout import layer_groups
from kvstore.store import TieredStore

BATCH_BYTES = 64 << 20  # blocks in flight between store and cache, however long the prefix


class PrefixLost(Exception):
    """A block that was looked up could not be read; the blocks before it may still be there."""


class Prefix:
    """Loads stored blocks into a cache, one group of layers after the other, in a thread.

    The loop calls `wait(layer)` and finds that layer's keys rotated and in place, while later
    layers still load. Sets `cache.length`; the cache must be empty.
    """

    def __init__(
        self, model: Model, cache: SequenceCache, store: TieredStore, keys: Sequence[BlockKey]
    ) -> None:
        assert cache.length == 0, "a prefix starts an empty cache"
        self._model, self._cache, self._store, self._keys = model, cache, store, keys
        cache.advance(sum(key.num_tokens for key in keys))
        self._tables = Tables(torch.arange(cache.length, device=model.shape.device))
        self._loads: dict[int, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, "headrace-prefix")
        per_layer = model.shape.kv_bytes_per_token // model.shape.num_layers * keys[0].num_tokens
        for group in layer_groups(model.shape.num_layers, per_layer):
            load = self._thread.submit(self._load, group)
            self._loads |= dict.fromkeys(group, load)
        self._thread.shutdown(wait=False)

    def wait(self, layer: int) -> None:
        """Return when `layer` is in the cache. PrefixLost if a block of it is gone."""
        self._loads[layer].result()

    def cancel(self) -> None:
        """Stop loading; returns when nothing writes to the cache any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def _load(self, group: range) -> None:
        """Read some layers of every block, rotate the keys, and put them in place."""
        shape, block = self._model.shape, self._keys[0].num_tokens
        per_block = shape.kv_bytes_per_token // shape.num_layers * len(group) * block
        at_once = max(1, BATCH_BYTES // per_block)
        for first in range(0, len(self._keys), at_once):
            keys = self._keys[first : first + at_once]
            parts = self._store.read_many(keys, group)
            found = [part for part in parts if part is not None]
            if len(found) < len(keys):
                raise PrefixLost(f"{len(keys) - len(found)} stored blocks could not be read")
            self._place(group, first * block, torch.cat(found, 3))

    def _place(self, group: range, start: int, data: torch.Tensor) -> None:
        """`data` [n 2 Hk T D] of layers `group` goes to tokens [start, start + T)."""
        span = slice(start, start + data.shape[3])
        for i, (k, v) in zip(group, data.to(self._model.shape.device), strict=True):
            rope = self._model.layers[i].rope
            cos, sin = self._tables[rope]
            rotated = rope.rotate(k, RopeTable(cos[span], sin[span]))
            self._cache.write(i, start, rotated, v)
