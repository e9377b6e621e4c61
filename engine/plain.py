"""What the engine does for a plain prompt: reuse its stored start, compute and store the rest."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from engine.breakeven import BreakEven
from engine.cache import Cache
from engine.config import EngineConfig
from engine.loading import BlocksLost, Loader
from engine.memory import Memory
from engine.model.pieces import Model
from engine.prefill import hidden_states, layer_slices
from engine.recorder import Recorder
from engine.request import Running
from engine.slices import Slices, Watch, drained
from engine.sparse.cache import SparseCache
from engine.staging import Placed
from kvstore.block import BlockKey, Kind, Precision
from kvstore.identity import ModelIdentity
from kvstore.store import TieredStore

log = logging.getLogger(__name__)

ATTEMPTS = 3  # to load; after them everything is computed


class Plain:
    """Exact prefill of prompts behind what one store has of them. Thread-safe."""

    def __init__(
        self,
        model: Model,
        store: TieredStore,
        memory: Memory,
        identity: ModelIdentity,
        config: EngineConfig,
        speeds: BreakEven,
    ) -> None:
        self._model, self._store, self._memory = model, store, memory
        self._identity, self._config, self._speeds = identity, config, speeds

    def keys(
        self,
        tokens: Sequence[int],
        repair: bytes | None = None,
        precision: Precision | None = None,
    ) -> list[BlockKey]:
        """Names of the full blocks: of KV as a prefill makes it, or a blend of that name.

        Args:
            precision: what it may have lost in the store; None is what the store's codec loses.
        """
        size = self._config.block_tokens
        chain = BlockKey.chain(
            tokens,
            identity=self._identity,
            tenant=self._config.tenant.encode(),
            size=size,
            kind=Kind.EXACT if repair is None else Kind.REPAIRED,
            warmup=repair or b"",
            precision=self._config.store.precision if precision is None else precision,
        )
        return chain[: len(tokens) // size]

    def prefill(self, run: Running) -> Float[Tensor, " vocab"]:
        """Logits after the prompt; its start comes from the store as far as that has it."""
        return drained(self.prefill_slices(run))

    def prefill_slices(self, run: Running) -> Slices[Float[Tensor, " vocab"]]:
        """As `prefill`, a chunk a slice, or one in one layer where it goes layer by layer."""
        usable = self.usable(run)
        with self._store.pin(usable):
            for _ in range(ATTEMPTS):
                try:
                    return (yield from self._read(run, self.found(usable, run)))
                except BlocksLost as lost:  # counted by the store, which will not offer it again
                    log.warning("computing the prompt again: %s", lost)
            return (yield from self._read(run, []))

    def usable(self, run: Running) -> Sequence[BlockKey]:
        """Blocks that may stand in for the start of a prompt: one token is always computed."""
        run.keys = self.keys(run.request.prompt, precision=run.precision)
        return run.keys[: (len(run.request.prompt) - 1) // self._config.block_tokens]

    def found(self, usable: Sequence[BlockKey], run: Running) -> Sequence[BlockKey]:
        """Those of them to load: none where to compute them is faster."""
        found = usable[: self._store.lookup(usable, run.shared)]
        return found if self._speeds.worth(found, len(run.request.prompt), run.shared) else []

    def save(self, run: Running) -> None:
        """Give the store the blocks that became complete, where the run keeps any.

        Not those of tokens whose step left out a part of the context: their KV is not what their
        names say.
        """
        assert run.cache is not None
        if run.cache.recorder is None:
            return
        length = run.cache.exact
        if blocks := run.cache.recorder.take(length):
            if blocks[-1][0] >= len(run.keys):
                tokens = run.all_tokens[:length]
                run.keys = self.keys(tokens, run.repair, run.precision)
            self._store.put([(run.keys[number], block) for number, block in blocks])

    def recorder(self, run: Running, start: int) -> Recorder:
        """Of blocks from the token `start` on.

        Not of an answer to documents that may end by its text: a service tells that end while more
        is decoded, so who deletes a document then could not know the names of all that is stored.
        """
        known = run.segments is None or not run.request.stop
        stop = None if known else len(run.request.prompt)
        size, empty = self._config.block_tokens, self._store.empty
        return Recorder(self._model.shape, size=size, start=start, stop=stop, empty=empty)

    def _read(self, run: Running, stored: Sequence[BlockKey]) -> Slices[Float[Tensor, " vocab"]]:
        """Prefill behind the `stored` blocks."""
        loader = self.begin(run, stored, paced=self._memory.pool is not None)
        cache, watch = run.cache, Watch()
        assert cache is not None
        start = cache.length
        try:
            logits = yield from watch.timed(self._compute(run, cache, loader))
            cache.finalize()
            if loader is not None:
                run.load_s, run.waited_s = loader.load_s, loader.waited_s
                self._speeds.loaded(stored, loader.load_s, run.shared)
            tokens = len(run.request.prompt) - start
            self._speeds.computed(tokens, watch.seconds - run.waited_s, start)
            return logits
        finally:
            if loader is not None:
                loader.cancel()

    def begin(
        self, run: Running, stored: Sequence[BlockKey], *, paced: bool = False
    ) -> Loader | None:
        """Make the run's cache, and load the `stored` blocks; the caller cancels the loader."""
        size = self._config.block_tokens
        start = len(stored) * size
        run.release()  # what a lost prefix left
        recorder = self.recorder(run, start)
        cache = run.cache = self._memory.cache(run, recorder)
        run.stored, run.stats.cached_tokens = stored, start
        if not stored:
            return None
        placed = [Placed(key, i * size) for i, key in enumerate(stored)]
        loader = Loader(self._model, cache, self._store, placed, start, paced=paced)
        cache.advance(start)
        return loader

    def _compute(
        self, run: Running, cache: Cache, loader: Loader | None
    ) -> Slices[Float[Tensor, " vocab"]]:
        """Read what of the prompt is not stored; layer by layer where layers move to a pool."""
        device, chunk = self._model.shape.device, self._config.chunk(self._model.shape.device)
        tokens = torch.tensor(run.request.prompt[cache.length :], device=device)
        if not isinstance(cache, SparseCache):
            read = hidden_states(self._model, cache, tokens, chunk=chunk, loader=loader, ends=True)
            for part, x in zip(tokens.split(chunk), read, strict=True):
                last = x
                self.save(run)
                yield len(part)
            return self._model.logits(last)[0]
        recorder = cache.recorder
        assert recorder is not None
        recorder.fill_on(torch.device("cpu"))  # all blocks are open until the last layer
        slices = layer_slices(self._model, cache, tokens, chunk=chunk, loader=loader)
        logits = yield from slices
        self.save(run)
        recorder.fill_on(device)
        return logits
