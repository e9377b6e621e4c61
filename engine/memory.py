"""Memory of running requests: who gets a cache, of which kind, and who has to wait."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch

from engine.cache import Cache, SequenceCache
from engine.config import EngineConfig
from engine.errors import PromptError
from engine.method import Method
from engine.model.pieces import Model
from engine.recorder import Recorder
from engine.request import Running
from engine.service.job import Need
from engine.service.slab import SlabCache
from engine.sparse.beside import Beside, beside
from engine.sparse.cache import SparseCache, pool_shape, sparse_layers
from kvstore.errors import PoolFull
from kvstore.layout import layer_groups
from kvstore.pool.pinned import PinnedTier
from kvstore.pool.pool import Pool
from kvstore.pool.spill import Spill


class Memory:
    """Makes the caches of requests, within the budgets of the configuration.

    With a sparse method, a prompt is read in memory of the model's device (`cache_bytes`), layer
    by layer, and rests in one pool for all requests (`pinned_bytes`, and `spill_bytes` on disk).
    Prompts are read one after the other; what stays on the device is the KV of dense layers, and
    what the others have in its place: indexes, estimates, buffers, factors.

    Raises:
        ConfigError: the method's index has no such option, or cannot be of this model's heads.
        PoolFull: a budget does not hold one block; names the setting.
    """

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self._model, self._config = model, config
        self.method = config.method
        first = torch.zeros(1, dtype=torch.int64, device=model.shape.device)
        self._hidden_bytes = model.embed(first).nbytes  # of a token
        self._known: tuple[int, Beside | None] = 0, None  # the last one, by tokens of its prompt
        sparse = set(sparse_layers(model, self.method))
        self._kept = len({x.owner for x in model.layers if not x.owns and x.owner in sparse})
        self.pool: Pool | None = None
        if sparse:
            beside(model.shape, self.method, 0)  # refuses what cannot be, before any prompt
            self.pool = _pool(model, config)
        self.batched = in_a_batch(model, self.method, self.pool)  # see `engine.decoding`

    def cache(self, run: Running, recorder: Recorder | None) -> Cache:
        """An empty cache with room for all that a request may need. PoolFull if there is none:
        now, not in the middle of an answer, whoever else asks for some meanwhile."""
        if self.pool is None:
            kind = SlabCache if run.movable else SequenceCache
            return kind(self._model.shape, run.capacity, recorder)
        cache = SparseCache(self._model, run.capacity, self.method, self.pool, recorder)
        try:
            cache.blocks(run.capacity)
        except PoolFull:
            cache.close()
            raise
        return cache

    def groups(self, runs: Iterable[Running]) -> Iterator[list[Running]]:
        """Runs that have room together, in order. PromptError for one that has none alone."""
        group: list[Running] = []
        for run in runs:
            self._refuse(run)
            if group and not self._fit([*group, run]):
                yield group
                group = []
            group.append(run)
        if group:
            yield group

    def _refuse(self, run: Running) -> None:
        needed, what = self._device_bytes([run]), "KV"
        if needed > self._config.cache_bytes:
            what += "" if self.pool is None else ", indexes and hidden states on the device"
            raise PromptError(
                f"a request of up to {run.capacity} tokens needs {needed} bytes of {what}, "
                f"cache_bytes is {self._config.cache_bytes}: raise it, or ask for less"
            )
        blocks = 0 if self.pool is None else self._blocks(run.capacity)
        if self.pool is not None and blocks > self.pool.num_blocks:
            setting = "spill_bytes" if self._config.spill_path else "pinned_bytes"
            raise PromptError(
                f"a request of up to {run.capacity} tokens needs {blocks} blocks, the "
                f"pool has {self.pool.num_blocks}: raise {setting}, or ask for less"
            )

    def _fit(self, runs: list[Running]) -> bool:
        if self._device_bytes(runs) > self._config.cache_bytes:
            return False
        return (
            self.pool is None
            or sum(self._blocks(run.capacity) for run in runs) <= self.pool.num_blocks
        )

    def _device_bytes(self, runs: list[Running]) -> int:
        """At most, while one of `runs` reads its prompt: what stays of all, and what passes."""
        shape = self._model.shape
        layer = shape.kv_bytes_per_token // shape.num_layers  # of a token
        moved = 0 if self.pool is None else self.pool.shape.num_layers
        tokens = [run.capacity for run in runs]
        if self.batched:  # its slots are alike
            tokens = [max(tokens)] * len(runs)
        stays = sum(tokens) * layer * (shape.num_layers - moved)
        if moved:
            own = [self._beside(len(run.request.prompt)) for run in runs]
            each = [moved * (n * x.token + x.fixed) for n, x in zip(tokens, own, strict=True)]
            stays += sum(each)
            if self.batched:  # and beside them a prompt has its own until it takes one
                stays += max(each)
        return stays + max(self._passing(run, layer, moved) for run in runs)

    def _passing(self, run: Running, layer: int, moved: int) -> int:
        """Bytes that a prompt takes while it is read, beside the KV of dense layers.

        Of the layers that move to the pool, a plain prompt has one on the device at a time, and
        as much again while its index is built; where its start is stored, the group of layers that
        are read together, too; and KV that several layers share, until the last has read it. One of
        segments has them all (`engine.blend.blend`).
        """
        if run.segments is not None:
            return run.capacity * layer * moved
        hidden = len(run.request.prompt) * self._hidden_bytes if moved else 0
        together = len(
            layer_groups(self._model.shape.num_layers, layer * self._config.block_tokens)[0]
        )
        return hidden + run.capacity * layer * min(1 + together + self._kept, moved)

    def _beside(self, prompt_tokens: int) -> Beside:
        """Of one layer that moves to the pool."""
        if self.method.budget >= 1:
            prompt_tokens = 0  # is all the same, and found once
        known, found = self._known
        if known != prompt_tokens or found is None:
            found = beside(self._model.shape, self.method, prompt_tokens)
            self._known = prompt_tokens, found
        return found

    def need(self, run: Running, *, slack: int = 0) -> Need:
        """Bytes of a token of a request that runs together with others over time.

        Prompts are then read chunk by chunk, so all layers of one are on the device until it is
        complete.

        Args:
            slack: see `Need`; of requests that may be moved.
        """
        if self.pool is None:
            token = self._model.shape.kv_bytes_per_token
            return Need(token, token, slack=slack, movable=run.movable)
        return self._sparse_need(len(run.request.prompt), run.capacity)

    def _sparse_need(self, prompt_tokens: int, capacity: int) -> Need:
        assert self.pool is not None
        shape, moved = self._model.shape, self.pool.shape.num_layers
        own, built = self._beside(prompt_tokens), 0
        layer = shape.kv_bytes_per_token // shape.num_layers
        if self.batched:  # a service's has room for all of it, but not before the prompt's end
            built = self._settling(capacity, layer, moved, own)
            own = Beside(0, 0)
        pool = self._blocks(capacity) * self.pool.shape.block_bytes
        return Need(
            prompt=shape.kv_bytes_per_token,
            answer=layer * (shape.num_layers - moved) + own.token * moved,
            fixed=own.fixed * moved,
            built=built,
            pool=pool // capacity,
            slack=pool % capacity,  # whole blocks, exactly
            movable=False,
        )

    def _settling(self, tokens: int, layer: int, moved: int, own: Beside) -> int:
        """Bytes at most while layers move to the pool one by one: each is in both for a while."""
        kv, each = tokens * layer, tokens * own.token + own.fixed
        layers = self._model.shape.num_layers
        return max(layers * kv + each, (layers - moved + 1) * kv + moved * each)

    @cached_property
    def longest(self) -> int:
        """Tokens that the budgets hold of one request, whatever part of them is its prompt."""
        budget = self._config.cache_bytes
        if self.pool is None:
            return budget // self._model.shape.kv_bytes_per_token
        most = self.pool.num_blocks * self.pool.shape.block_tokens

        def taken(tokens: int) -> int:
            return self._sparse_need(tokens, tokens).most(tokens)

        return bisect_right(range(1, most + 1), budget, key=taken)

    @property
    def pool_bytes(self) -> int:
        """Of all requests' KV in the pool, in memory or not."""
        return 0 if self.pool is None else self.pool.num_blocks * self.pool.shape.block_bytes

    def _blocks(self, tokens: int) -> int:
        assert self.pool is not None
        return -(-tokens // self.pool.shape.block_tokens)

    def close(self) -> None:
        """Free the pool. StoreError while a request still runs."""
        if self.pool is not None:
            self.pool.close()


def in_a_batch(model: Model, method: Method, pool: Pool | None) -> bool:
    """Whether requests are decoded together, in static shapes."""
    if pool is None or model.shape.device.type != "cuda":
        return False
    from engine.batch.batch import why_not  # needs Triton, which not every machine has

    return why_not(model, method, pool) is None


def _pool(model: Model, config: EngineConfig) -> Pool:
    """Of all requests of a sparse method."""
    with ExitStack() as undo:
        spill = None
        if config.spill_path is not None:
            spill = Spill(Path(config.spill_path), config.spill_bytes)
            undo.callback(spill.close)
        pool = PinnedTier(
            pool_shape(model, config.method),
            config.pinned_bytes,
            spill=spill,
            locked=model.shape.device.type == "cuda",
        )
        undo.pop_all()  # the pool closes it from now on
        return pool
