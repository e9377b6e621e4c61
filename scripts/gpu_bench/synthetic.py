"""Requests whose KV nobody computed, and choices with a given share of hits.

The rows that a random model chooses mean nothing, so choices are given; contents of host memory
are random, and all layers share one layer's slab and one layer's index. Each layer still keeps its
own index, tables and buffers on the device, and reads other rows of host memory than the last.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.batch.batch import DeviceBatch
from engine.method import Method
from engine.model.pieces import Model
from engine.sparse.cache import pool_shape
from engine.sparse.layer import SparseLayer
from kvstore.pool.lease import Lease
from kvstore.pool.pinned import PinnedTier
from kvstore.rows import PoolShape
from retrieval.codebook import Codebook
from retrieval.kernels.choose import best_tokens
from retrieval.kernels.scores import Scores
from retrieval.metric import Metric

ROOM = 256  # tokens that may follow
TURNS = 64  # choices after which they begin anew: long after a buffer has forgotten them
ENDS = 64  # first and last tokens that are in no choice: they are in the buffer anyway


class OneSlab(PinnedTier):
    """Page-locked memory of one layer, for all layers; random bytes of numbers of the dtype."""

    def __init__(self, shape: PoolShape, blocks: int, device: torch.device) -> None:
        self._only: Tensor | None = None
        self._is_locked = False
        super().__init__(shape, blocks * shape.block_bytes, locked=device.type == "cuda")
        for block in self.slab(0).split(1024):
            numbers = torch.randn(block.nbytes // 2, dtype=torch.bfloat16, device=device)
            block.view(-1).copy_(numbers.view(torch.uint8))

    def _slab(self, count: int) -> Tensor:
        if self._only is None:
            self._only = super()._slab(count)
        return self._only

    def close(self) -> None:
        super().close()
        self._only = None

    def _lock_pages(self, slab: Tensor) -> None:
        if not self._is_locked:
            super()._lock_pages(slab)
        self._is_locked = True


class Filled:
    """Stands where `DeviceBatch` takes a `SparseCache` whose prompt is complete."""

    def __init__(self, layer: SparseLayer, lease: Lease, length: int) -> None:
        self.length, self._layer, self._lease = length, layer, lease

    def layer(self, number: int) -> SparseLayer:
        return self._layer

    def blocks(self, tokens: int) -> Tensor:
        self._lease.reserve(tokens)
        return self._lease.table

    def seated(self, seat: object) -> None:
        """Nothing: the layer is there for all, and the batch has its own copy of it."""

    def take(self, made: Tensor) -> None:
        """Nothing: no store waits for them."""


class Requests:
    """A batch of such requests, ready to be stepped; a context manager that frees their memory."""

    def __init__(
        self, model: Model, method: Method, slots: int, tokens: int, *, hits: float, guessed: float
    ) -> None:
        self.method = method
        self.pool = pool_of(model, method, slots, tokens + ROOM)
        self._leases = [self.pool.lease() for _ in range(slots)]
        layer = layer_of(model, method, self.pool, self._leases[0], tokens)
        assert layer.choice is not None, "filled"
        unit = layer.choice.index.spec.unit_tokens
        select = Forced(model, method, slots, tokens, unit=unit, hits=hits, guessed=guessed)
        capacity = tokens + ROOM
        self.batch = DeviceBatch(
            model, method, self.pool, slots=slots, capacity=capacity, select=select
        )
        for lease in self._leases:
            filled: Any = Filled(layer, lease, tokens)
            self.batch.adopt(filled, ROOM)

    def __enter__(self) -> "Requests":
        return self

    def __exit__(self, *_: object) -> None:
        del self.batch
        for lease in self._leases:
            lease.close()
        self.pool.close()


def pool_of(model: Model, method: Method, slots: int, capacity: int) -> OneSlab:
    shape = pool_shape(model, method)
    return OneSlab(shape, slots * -(-capacity // shape.block_tokens), model.shape.device)


@torch.inference_mode()
def layer_of(model: Model, method: Method, pool: OneSlab, lease: Lease, length: int) -> SparseLayer:
    """One layer of a request of random keys, with its index, as a prompt leaves it."""
    s, piece = model.shape, model.layers[-1]
    size = (s.num_kv_heads, length, s.head_dim)
    k, v = (torch.randn(size, dtype=s.dtype, device=s.device) for _ in range(2))
    queries = torch.randn(s.num_heads, 128, s.head_dim, dtype=s.dtype, device=s.device)
    layer = SparseLayer(s, piece.attention, piece.rope, method, lease, pool, 0)
    with mock.patch("retrieval.learner.train_codebook", drawn):
        layer.fill(k, v, queries)
    return layer


def drawn(
    keys: Tensor, metric: Metric, *, subspaces: int = 1, centroids: int = 256, **_: Any
) -> Codebook:
    """A codebook of keys as they come, in no time: no step is faster with a better one."""
    z = torch.stack([metric.head(i).keys(own[None, :centroids])[0] for i, own in enumerate(keys)])
    return Codebook(z.unflatten(-1, (subspaces, -1)).transpose(1, 2).contiguous(), metric)


class Forced:
    """A `Select` of which the share `hits` was chosen in the step before.

    The best tokens are chosen nevertheless, so that the time it takes counts. Choices are windows
    of a ring of tokens, each further by what is to miss; which of them is next says the length,
    on the device.

    Args:
        unit: tokens that share a score in the method's index.
        guessed: of what a step misses, the share that a guess asks for ahead of it.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        slots: int,
        length: int,
        *,
        unit: int,
        hits: float,
        guessed: float = 0.0,
    ) -> None:
        s, budget = model.shape, int(method.budget)
        self._heads, self._policy, self._unit = s.num_kv_heads, method.policy(budget), unit
        self._ahead, self._asked = method.prefetch == "layer", set[int]()
        span, moved = length - 2 * ENDS, round((1 - hits) * budget)
        self.turns = max(1, min(TURNS, span // max(1, moved)))
        ring = max(budget, self.turns * moved)  # the last window is followed by the first
        order = torch.rand(s.num_kv_heads, span, device=s.device).argsort(-1) + ENDS
        starts = torch.arange(self.turns, device=s.device)[:, None] * moved
        at = (starts + torch.arange(budget, device=s.device)) % ring
        windows = order[:, at].transpose(0, 1)  # [turns, Hk, K]
        known = budget - moved + round(guessed * moved)
        ahead = windows[..., :known].sort(-1).values
        self._guesses = F.pad(ahead, (0, budget - known), value=-1).int()  # [turns, Hk, K]
        self._ids = windows.sort(-1).values.int()
        self._apart = torch.arange(slots, device=s.device) * max(1, self.turns // slots)

    def __call__(self, layer: int, scores: Scores, lengths: Tensor) -> Tensor:
        """Ids [B, Hk, K]. Layers behind the first guess first, before the newest token is there."""
        best_tokens(
            scores,
            lengths,
            self._policy,
            num_kv_heads=self._heads,
            scale=1.0,
            unit=self._unit,
        )
        guesses = self._ahead and layer > 0 and layer not in self._asked
        (self._asked.add if guesses else self._asked.discard)(layer)
        turn = (lengths + self._apart + 7 * layer + guesses) % self.turns
        return (self._guesses if guesses else self._ids).index_select(0, turn)
