"""Memory of running requests: who gets a cache, of which kind, and who has to wait."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.cache import Cache, SequenceCache
from engine.config import EngineConfig
from engine.errors import PromptError
from engine.model import Model
from engine.recorder import Recorder
from engine.request import Running
from engine.sparse_cache import SparseCache, pool_shape, sparse_layers
from kvstore.pinned import PinnedTier
from kvstore.pool import Pool
from kvstore.spill import Spill


class Memory:
    """Makes the caches of requests, within the budgets of the configuration.

    With a sparse method, a prompt is read in memory of the model's device (`cache_bytes`), and
    then rests in one pool for all requests (`pinned_bytes`, and `spill_bytes` on disk).

    Raises:
        PoolFull: a budget does not hold one block; names the setting.
    """

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self._model, self._config = model, config
        self.pool: Pool | None = None
        if sparse_layers(model, config.method):
            spill = None
            if config.spill_path is not None:
                spill = Spill(Path(config.spill_path), config.spill_bytes)
            shape = pool_shape(model, config.method)
            self.pool = PinnedTier(shape, config.pinned_bytes, spill=spill)

    def cache(self, run: Running, recorder: Recorder | None) -> Cache:
        """An empty cache with room for all that a request may need. PoolFull if there is none."""
        if self.pool is None:
            return SequenceCache(self._model.shape, run.capacity, recorder)
        return SparseCache(self._model, run.capacity, self._config.method, self.pool, recorder)

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
        needed = run.capacity * self._model.shape.kv_bytes_per_token
        if needed > self._config.cache_bytes:
            raise PromptError(
                f"a request of up to {run.capacity} tokens needs {needed} bytes of KV, "
                f"cache_bytes is {self._config.cache_bytes}: raise it, or ask for less"
            )
        if self.pool is not None and self._blocks(run) > self.pool.num_blocks:
            setting = "spill_bytes" if self._config.spill_path else "pinned_bytes"
            raise PromptError(
                f"a request of up to {run.capacity} tokens needs {self._blocks(run)} blocks, the "
                f"pool has {self.pool.num_blocks}: raise {setting}, or ask for less"
            )

    def _fit(self, runs: list[Running]) -> bool:
        if self.pool is not None:
            return sum(map(self._blocks, runs)) <= self.pool.num_blocks
        taken = sum(run.capacity for run in runs) * self._model.shape.kv_bytes_per_token
        return taken <= self._config.cache_bytes

    def _blocks(self, run: Running) -> int:
        assert self.pool is not None
        return -(-run.capacity // self.pool.shape.block_tokens)

    def close(self) -> None:
        """Free the pool. StoreError while a request still runs."""
        if self.pool is not None:
            self.pool.close()
