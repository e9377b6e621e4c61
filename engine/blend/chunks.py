"""Chunks computed alone, behind the instructions that they share, and stored under their names."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial

import torch

from engine.blend.segments import Tokens, digest
from engine.cache import SequenceCache
from engine.errors import PromptError
from engine.model.pieces import Model
from engine.perfmodel import PerfModel
from engine.prefill import hidden_states
from engine.recorder import Recorder
from kvstore.block import BlockKey, Kind, KVBlock, Precision
from kvstore.identity import ModelIdentity
from kvstore.sources import Shared
from kvstore.store import TieredStore

Computed = dict[BlockKey, KVBlock]


class Chunks:
    """The chunks of one model and tenant in a store. Thread-safe.

    Args:
        size: tokens of a block.
        step: tokens computed at once.
        speeds: learns from what is computed.
    """

    def __init__(
        self,
        model: Model,
        store: TieredStore,
        identity: ModelIdentity,
        *,
        tenant: bytes,
        size: int,
        step: int,
        speeds: PerfModel,
    ) -> None:
        self._model, self._store, self._identity, self._tenant = model, store, identity, tenant
        self._size, self._step, self._speeds = size, step, speeds
        self._computing = threading.Lock()  # one chunk: nobody computes what another just does

    def keys(
        self, prefix: Tokens, chunk: Tokens, precision: Precision = Precision.EXACT
    ) -> list[BlockKey]:
        """Names of a chunk's blocks behind a prefix; the last one may be of fewer tokens."""
        return self._chain(chunk, precision, Kind.CHUNK, digest(prefix))

    def _chain(
        self, tokens: Tokens, precision: Precision, kind: Kind = Kind.EXACT, warmup: bytes = b""
    ) -> list[BlockKey]:
        return BlockKey.chain(
            tokens,
            identity=self._identity,
            tenant=self._tenant,
            size=self._size,
            kind=kind,
            warmup=warmup,
            precision=precision,
        )

    def check(self, prefix: Tokens, chunk: Tokens) -> None:
        """PromptError for a chunk that the model cannot read behind the prefix."""
        shape, needed = self._model.shape, len(prefix) + len(chunk)
        if not chunk:
            raise PromptError("a chunk is empty: at least one token is needed")
        if needed > shape.max_positions:
            raise PromptError(
                f"a chunk of {len(chunk)} tokens behind {len(prefix)} of instructions needs "
                f"{needed} positions, the model has {shape.max_positions}: split the chunk"
            )
        if bad := [token for token in (*prefix, *chunk) if not 0 <= token < shape.vocab]:
            raise PromptError(
                f"token id {bad[0]} is out of range: the model knows 0 to {shape.vocab - 1}"
            )

    def complete(
        self,
        prefix: Tokens,
        chunks: Sequence[Tokens],
        precision: Precision,
        lost: Set[BlockKey] = frozenset(),
        shared: Shared = None,
    ) -> Iterator[Computed]:
        """Store what is missing; for every chunk, its blocks where they had to be computed.

        Args:
            precision: what the blocks may lose in the store.
            lost: blocks that count as missing, whatever the store says.
            shared: as in `TieredStore.lookup`.
        """
        alone: _Alone | None = None
        for chunk in chunks:
            keys, made = self.keys(prefix, chunk, precision), Computed()
            with self._computing:
                if self._store.lookup(keys, shared) < len(keys) or not lost.isdisjoint(keys):
                    alone = alone or self._alone(prefix, chunks, precision)
                    began = time.perf_counter()
                    made = dict(zip(keys, alone.blocks(chunk), strict=True))
                    spent = time.perf_counter() - began
                    self._speeds.prefilled(len(chunk), spent, start=len(prefix))
                    self._store.put(list(made.items()))
            yield made

    def _alone(self, prefix: Tokens, chunks: Sequence[Tokens], precision: Precision) -> "_Alone":
        """Reads the prefix. Its own blocks are those of every prompt that begins so."""
        longest = max(map(len, chunks))
        make = partial(Recorder, self._model.shape, size=self._size, empty=self._store.empty)
        alone = _Alone(self._model, prefix, longest, make, step=self._step)
        whole = prefix[: len(prefix) // self._size * self._size]
        self._store.put(list(zip(self._chain(whole, precision), alone.prefix, strict=True)))
        return alone


class _Alone:
    """Computes chunks as if each alone followed the prefix, which is computed once."""

    def __init__(
        self,
        model: Model,
        prefix: Tokens,
        longest: int,
        recorder: Callable[..., Recorder],
        *,
        step: int,
    ) -> None:
        self._model, self._recorder, self._step = model, recorder, step
        self._cache = SequenceCache(model.shape, len(prefix) + longest)
        self._behind = len(prefix)
        self.prefix = self._recorded(prefix, origin=0)  # its whole blocks

    def blocks(self, chunk: Tokens) -> list[KVBlock]:
        """Unrotated KV of a chunk, whose last block may be of fewer tokens."""
        self._cache.length = self._behind  # attention is causal: no chunk changed what lies before
        made, recorder = self._recorded(chunk, origin=self._behind), self._cache.recorder
        assert recorder is not None
        return [*made, *(block for _, block in recorder.rest(self._cache.length))]

    @torch.inference_mode()
    def _recorded(self, tokens: Tokens, *, origin: int) -> list[KVBlock]:
        """Whole blocks of these tokens, the next ones in the cache."""
        cache, recorder = self._cache, self._recorder(start=0, origin=origin)
        cache.recorder = recorder
        if tokens:
            ids = torch.tensor(tokens, device=self._model.shape.device)
            for _ in hidden_states(self._model, cache, ids, chunk=self._step, ends=True):
                pass  # what matters is written to the cache
        return [block for _, block in recorder.take(cache.length)]
