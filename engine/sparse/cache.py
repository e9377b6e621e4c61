"""A request's cache that attends to what matters: a drop-in for `SequenceCache`."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.cache import Query, SequenceCache, SparseStats
from engine.errors import EngineError
from engine.method import Method
from engine.model.pieces import AttentionSpec, Model, owners
from engine.recorder import Recorder
from engine.sparse.layer import SparseLayer
from kvstore.block import LayerKV
from kvstore.pool.lease import Lease
from kvstore.pool.pool import Pool
from kvstore.rows import PoolShape, Raw, RowCodec, RowLayout, row_codec
from native.threads import use_one_core

Predictor = Callable[[int, Query | None], Query | None]  # layer, the loop's guess -> ours
OBSERVED = 128  # queries of the end of the prompt that indexes may learn from


def sparse_layers(model: Model, method: Method) -> list[int]:
    """The layers whose tokens are selected, by the number of their KV.

    Not the first dense ones, none with a window. Where layers share KV, all of them select.
    """
    if not method.sparse:
        return []
    return [
        layer.owner
        for i, layer in enumerate(model.layers)
        if layer.owns and i >= method.dense_layers and layer.attention.window is None
    ]


def pool_shape(model: Model, method: Method) -> PoolShape:
    """What the pool of a model's sparse layers holds."""
    shape = model.shape
    k = None if method.keys == "lowrank" else _codec(method.keys, shape.dtype)
    layout = RowLayout(k, _codec(method.values, shape.dtype), shape.head_dim, shape.dtype)
    return PoolShape(len(sparse_layers(model, method)), shape.num_kv_heads, layout)


def _codec(name: str, dtype: torch.dtype) -> RowCodec:
    return Raw(dtype) if name == "exact" else row_codec(name)


@runtime_checkable
class Seat(Protocol):
    """A request's place in a batch: what it did there, and how it is given up."""

    def stats(self) -> SparseStats: ...
    def leave(self) -> None: ...


class SparseCache:
    """Dense while the prompt is read; then KV moves to a pool and each step attends to a choice.

    A layer moves when it is `complete`, or with all others in `finalize`: a loop that reads layer
    after layer (`layer_slices`) never has more than one of those that move. Layers with a
    sliding window, and the method's dense layers, stay as they are.

    Args:
        predict: replaces guessed queries of `prefetch`; for tests.
    """

    def __init__(
        self,
        model: Model,
        capacity: int,
        method: Method,
        pool: Pool,
        recorder: Recorder | None = None,
        predict: Predictor | None = None,
    ) -> None:
        self.method, self._predict = method, predict
        self._dense = SequenceCache(model.shape, capacity, recorder)
        self._num_layers = model.shape.num_layers
        self._lease = pool.lease()
        self._layers = {
            i: _layer(model, method, pool, self._lease, number, i)
            for number, i in enumerate(sparse_layers(model, method))
        }
        self._selecting = sum(layer.owner in self._layers for layer in model.layers)
        self._queries: dict[int, Tensor] = {}
        self._final = self._closed = False
        self._exact = sys.maxsize  # tokens, at most, whose steps attended to all; see `exact`
        self._seat: Seat | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: dict[int, Future[None]] = {}

    @property
    def length(self) -> int:
        return self._dense.length

    @property
    def exact(self) -> int:
        """The prompt, and what follows as long as the budget holds all tokens."""
        return min(self.length, self._exact)

    @property
    def recorder(self) -> Recorder | None:
        return self._dense.recorder

    @property
    def stats(self) -> SparseStats:
        """Of all layers; a step counts once."""
        if self._seat is not None:
            return self._seat.stats()
        total = SparseStats()
        for layer in self._layers.values():
            total += layer.stats
        total.steps //= max(1, self._selecting)
        return total

    @property
    def device_bytes(self) -> int:
        """Of indexes, hot buffers and factors: what the device holds instead of the KV."""
        return sum(layer.device_bytes for layer in self._layers.values())

    def layer(self, number: int) -> SparseLayer:
        """The sparse state of a layer, by the number of its KV. KeyError if it is dense."""
        return self._layers[number]

    # the prompt

    def write(
        self, layer: int, start: int, rotated: Float[Tensor, "Hk N D"], v: Float[Tensor, "Hk N D"]
    ) -> LayerKV:
        """As `SequenceCache.write`; for prompts."""
        return self._dense.write(layer, start, rotated, v)

    def view(self, layer: int, stop: int) -> LayerKV:
        """As `SequenceCache.view`; until the layer's prompt is complete."""
        return self._dense.view(layer, stop)

    def observe(self, layer: int, queries: Float[Tensor, "Hq N D"]) -> None:
        """Keep the last unrotated queries of the prompt, where something comes of them."""
        if layer in self._layers and (self.method.index == "vq" or self.method.prefetch == "step"):
            self._queries[layer] = latest(self._queries.get(layer), queries)

    def complete(self, layer: int, length: int) -> None:
        """A layer has all `length` tokens of the prompt: move them to the pool, build its index."""
        if layer in self._layers:
            kv = self._dense.view(layer, length)
            self.fill(layer, kv.k, kv.v, self._queries.pop(layer, None))

    def finalize(self) -> None:
        """The prompt is complete in every layer: move those that were not moved one by one."""
        for _ in self.settle():
            pass

    @torch.inference_mode()
    def settle(self) -> Iterator[None]:
        """As `finalize`, a layer a slice: for those who have other things to do in between."""
        for i, layer in self._layers.items():
            if layer.choice is None:
                self.complete(i, self.length)
                yield
        self._end_prompt()

    def fill(
        self,
        layer: int,
        rotated: Float[Tensor, "Hk T D"],
        v: Float[Tensor, "Hk T D"],
        queries: Float[Tensor, "Hq Q D"] | None = None,
    ) -> None:
        """Take a layer's prompt from elsewhere; after all layers, `adopt` the length.

        Args:
            queries: the last ones of the prompt, unrotated; see `observe`.
        """
        if layer in self._layers:
            self._layers[layer].fill(rotated, v, queries)
            self._dense.release(layer)
        else:
            self._dense.write(layer, 0, rotated, v)

    def adopt(self, length: int) -> None:
        """The prompt that `fill` took is complete."""
        self._dense.advance(length)
        self._end_prompt()

    def _end_prompt(self) -> None:
        self._final = True
        budgets = [x.choice.policy.budget for x in self._layers.values() if x.choice is not None]
        self._exact = max(self.length, min(budgets) if self.method.exact_rows else 0)

    # the steps

    def append(
        self,
        layer: int,
        k: Float[Tensor, "Hk N D"],
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV:
        """Write N tokens after `length`; of a prompt, returns all tokens, else the new ones."""
        self._stop_recording()
        if not (self._final and layer in self._layers):
            return self._dense.append(layer, k, rotated, v)
        if self.recorder is not None:
            self.recorder.write(layer, self.length, k, v)
        self._wait(layer)
        self._layers[layer].append(rotated, v)
        return LayerKV(rotated, v)

    def advance(self, count: int) -> None:
        """Declare `count` more tokens complete in every layer."""
        self._dense.advance(count)

    def attend(self, layer: int, query: Query, spec: AttentionSpec) -> Float[Tensor, "Hq D"]:
        """Attention of the token appended last over what its query selects."""
        if not self._final:
            raise EngineError("finalize() comes between the prompt and the first step")
        if layer not in self._layers:
            return self._dense.attend(layer, query, spec)
        self._wait(layer)  # one that shares this KV appends nothing
        return self._layers[layer].attend(query)

    @property
    def wants_guess(self) -> bool:
        return self._final and self.method.prefetch == "layer"

    def look_ahead(self, layer: int, guess: Query | None) -> None:
        """Fetch in a thread what a guess selects, while the layers before are computed."""
        if self.method.prefetch == "none" or layer not in self._layers or not self._final:
            return
        state = self._layers[layer]
        guess = state.last if self.method.prefetch == "step" else guess
        if self._predict is not None:
            guess = self._predict(layer, guess)
        if guess is None or layer in self._pending:  # of another layer that attends to this KV
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "headrace-prefetch", use_one_core)
        self._pending[layer] = self._thread.submit(_prefetch, state, guess)

    def _wait(self, layer: int) -> None:
        """Until nothing moves in a layer any more."""
        if (pending := self._pending.pop(layer, None)) is not None:
            start = time.perf_counter()
            pending.result()
            self._layers[layer].stats.waited_s += time.perf_counter() - start

    # in a batch

    def blocks(self, tokens: int) -> Int[Tensor, " N"]:
        """The pool's blocks for so many tokens, taken now. PoolFull if there are too few."""
        self._lease.reserve(tokens)
        return self._lease.table

    def seated(self, seat: "Seat") -> None:
        """A batch decodes this request from now on: only its blocks and its recorder stay here."""
        self._seat = seat
        for i in range(self._num_layers):
            if i in self._layers:
                self._layers[i].surrender()
            else:
                self._dense.release(i)

    def take(self, kv: Float[Tensor, "L 2 Hk D"]) -> None:
        """The unrotated KV of one more token, as the batch made it."""
        self._stop_recording()
        if self.recorder is not None:
            self.recorder.write_token(self.length, kv)
        self.advance(1)

    def _stop_recording(self) -> None:
        """From the first token on that is not `exact`; what was, the store has by then."""
        if self.length >= self._exact:
            self._dense.recorder = None

    def close(self) -> None:
        """Free the pool's blocks; returns when no thread uses them any more."""
        if not self._closed:
            self._closed = True
            if self._seat is not None:
                self._seat.leave()
            if self._thread is not None:
                self._thread.shutdown(wait=True, cancel_futures=True)
            self._lease.close()


def latest(
    before: Float[Tensor, "Hq M D"] | None, queries: Float[Tensor, "Hq N D"]
) -> Float[Tensor, "Hq K D"]:
    """The last `OBSERVED` queries of a prompt, of which N follow those kept before."""
    missing = OBSERVED - queries.shape[1]
    if before is None or missing <= 0:
        return queries[:, -OBSERVED:].clone()
    return torch.cat([before[:, -missing:], queries], 1)


@torch.inference_mode()
def _prefetch(layer: SparseLayer, guess: Query) -> None:
    layer.prefetch(guess)


def _layer(
    model: Model, method: Method, pool: Pool, lease: Lease, number: int, i: int
) -> SparseLayer:
    piece, shape = owners(model)[i], model.shape
    return SparseLayer(shape, piece.attention, piece.rope, method, lease, pool, number)
