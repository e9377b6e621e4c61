"""One layer of a batch of requests, in static shapes: nothing here asks the device for a number."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from engine.batch.factors import BatchFactors
from engine.batch.indexes import device_index
from engine.batch.tail import BatchTail
from engine.kernels.attend_slots import attend_slots
from engine.kernels.rotate_rows import rotate_rows
from engine.method import Method
from engine.model.pieces import AttentionSpec, Shape
from engine.model.rope import Rope
from engine.sparse.choice import unturned
from engine.sparse.hot import HotTables
from engine.sparse.layer import SparseLayer
from engine.sparse.rows import raw_rows
from kvstore.block import LayerKV
from kvstore.kernels.append import append
from kvstore.kernels.gather import gather
from kvstore.kernels.resolve import Residency, Resolved, forget, resolve
from kvstore.pool.pool import Pool
from retrieval.kernels.choose import best_tokens
from retrieval.kernels.scores import Scores


class Fresh(NamedTuple):
    """The newest token of every slot: what its layer made of it."""

    rotated_q: Float[Tensor, "B Hq D"]
    q: Float[Tensor, "B Hq D"]
    rotated_k: Float[Tensor, "B Hk D"]
    k: Float[Tensor, "B Hk D"]
    v: Float[Tensor, "B Hk D"]


class Clock(NamedTuple):
    """Where every slot is; on the device, changed in place by the batch."""

    positions: Int32[Tensor, " B"]  # of the newest token; -1: the slot is free
    lengths: Int32[Tensor, " B"]  # tokens there are, the newest included; 0: the slot is free
    now: Int32[Tensor, ""]  # steps done


@runtime_checkable
class Select(Protocol):
    """Which tokens each KV head attends to, by the scores of a layer: -1 behind the last."""

    def __call__(
        self, layer: int, scores: Scores, lengths: Int32[Tensor, " B"]
    ) -> Int32[Tensor, "B Hk K"]: ...


class RingLayer:
    """A layer that attends to all of its last tokens: those of a sliding window, or all there are.

    Args:
        capacity: tokens of a request; a layer without a window keeps so many.
    """

    def __init__(self, shape: Shape, spec: AttentionSpec, slots: int, capacity: int) -> None:
        self._spec, self._size = spec, min(spec.window or capacity, capacity)
        self._layout = raw_rows(shape)
        size = (slots, shape.num_kv_heads, self._size, self._layout.row_bytes)
        self._rows = torch.zeros(size, dtype=torch.uint8, device=shape.device)
        self._order = torch.arange(self._size, dtype=torch.int32, device=shape.device)
        self._slots = torch.arange(slots, device=shape.device)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def adopt(self, slot: int, kv: LayerKV) -> None:
        """The last tokens of a prompt."""
        length = kv.v.shape[1]
        kept = torch.arange(max(0, length - self._size), length, device=kv.v.device)
        rows = self._layout.encode(kv.k[:, kept], kv.v[:, kept])
        self._rows[slot, :, kept % self._size] = rows

    def attend(self, fresh: Fresh, clock: Clock) -> Float[Tensor, "B Hq D"]:
        """Attention of the newest tokens, which are written first."""
        at = clock.positions.clamp_min(0).long() % self._size  # a free slot's row is nobody's
        rows = self._layout.encode(fresh.rotated_k, fresh.v)
        self._rows[self._slots, :, at] = rows
        there = torch.where(self._order < clock.lengths[:, None], self._order, -1)
        listed = there[:, None].expand(-1, rows.shape[1], -1).contiguous()
        return attend_slots(
            fresh.rotated_q,
            self._rows,
            listed,
            layout=self._layout,
            scale=self._spec.scale,
            softcap=self._spec.softcap,
        ).out


class SelectedLayer:
    """A layer whose tokens are selected: an index and a hot buffer here, the KV in a pool.

    Args:
        number: of the layer in its pool.
        there: which tokens are in its buffers; says how many slots there are, and of what.
        select: takes the place of the best by the policy.
    """

    def __init__(
        self,
        shape: Shape,
        spec: AttentionSpec,
        rope: Rope,
        method: Method,
        pool: Pool,
        number: int,
        there: Residency,
        *,
        capacity: int,
        select: Select | None = None,
    ) -> None:
        self._shape, self._spec, self._rope, self._method = shape, spec, rope, method
        self._pool, self._number, self._select, self._there = pool, number, select, there
        slots, _, hot = there.token.shape
        budget = method.tokens(capacity)  # as every request has it: no share of its prompt
        self._policy = method.policy(min(budget, capacity))
        self._layout = raw_rows(shape)
        self._index = device_index(method, shape, slots, capacity, budget)
        size = (slots, shape.num_kv_heads, hot, self._layout.row_bytes)
        self._hot = torch.zeros(size, dtype=torch.uint8, device=shape.device)
        self._lowrank: BatchFactors | None = None
        if method.keys == "lowrank":
            self._lowrank = BatchFactors(shape, rope, method.rank, slots, capacity)
        self._tail = BatchTail(shape, slots, capacity, spec.softcap) if method.tail else None
        at = torch.full((slots,), method.distance, device=shape.device)
        self._placed = rope.table(at)  # of windowed indexes
        # of every KV head, tokens that were selected, and of these those that were missing
        self.counts = torch.zeros(
            (2, slots, shape.num_kv_heads), dtype=torch.int64, device=shape.device
        )

    @property
    def fetches_keys(self) -> bool:
        """Whether a row that is fetched holds a key."""
        return self._pool.shape.layout.k is not None

    @property
    def row_bytes(self) -> int:
        """Of what a miss fetches."""
        return self._pool.shape.layout.row_bytes

    @property
    def nbytes(self) -> int:
        tables = sum(x.nbytes for x in (*self._there, *self._placed, self._hot))
        parts = (self._index, self._lowrank, self._tail)
        return tables + sum(part.nbytes for part in parts if part is not None)

    # requests come and go

    def adopt(self, slot: int, layer: SparseLayer, now: int) -> None:
        """A request whose prompt is complete, with what its own buffer holds."""
        assert layer.choice is not None, "fill() comes first"
        assert layer.rows.hot is not None, "a request that is to join a batch has a buffer"
        self._index.adopt(slot, layer.choice.index)
        self._take(slot, layer.rows.hot.tables(now))
        if self._lowrank is not None:
            assert layer.rows.lowrank is not None
            self._lowrank.adopt(slot, layer.rows.lowrank)
        if self._tail is not None:
            assert layer.tail is not None
            self._tail.adopt(slot, layer.tail)
        self.counts[:, slot] = 0

    def release(self, slot: int) -> None:
        """The slot is free."""
        self._index.clear(slot)
        forget(self._there, slot)

    def _take(self, slot: int, tables: HotTables) -> None:
        forget(self._there, slot)
        self._hot[slot] = tables.rows
        width = min(tables.slot.shape[1], self._there.slot.shape[2])  # none is behind the capacity
        self._there.slot[slot, :, :width] = tables.slot[:, :width]
        self._there.token[slot], self._there.used[slot] = tables.token, tables.used

    # the step

    def fetch_ahead(self, guess: Fresh, clock: Clock, blocks: Int32[Tensor, "B N"]) -> None:
        """Bring here what a guessed query selects, of the tokens before the newest."""
        lengths = clock.positions.clamp_min(0)
        self._fetch(self._ids(guess, lengths), clock, blocks)

    def attend(
        self, fresh: Fresh, clock: Clock, blocks: Int32[Tensor, "B N"], place: Int32[Tensor, "B Hk"]
    ) -> Float[Tensor, "B Hq D"]:
        """Attention of the newest tokens over what their queries select, themselves included.

        Args:
            place: slots of the hot buffer that are theirs.
        """
        self._append(fresh, clock, blocks, place)
        ids = self._ids(fresh, clock.lengths)
        found = self._fetch(ids, clock, blocks, self.counts)
        return self._attended(fresh.rotated_q, ids, found.slots, clock.lengths)

    def _attended(
        self, q: Tensor, ids: Tensor, slots: Tensor, lengths: Tensor
    ) -> Float[Tensor, "B Hq D"]:
        """What is selected exactly, and with a tail an estimate of all else."""
        scale, softcap = self._spec.scale, self._spec.softcap
        if self._tail is None:
            return attend_slots(q, self._hot, slots, self._layout, scale, softcap).out
        return self._tail.attend(q, lengths, ids, self._hot, slots, self._layout, scale)

    def _append(self, fresh: Fresh, clock: Clock, blocks: Tensor, place: Tensor) -> None:
        append(
            fresh.rotated_k,
            fresh.v,
            clock.positions,
            self._pool.slab(self._number),
            blocks,
            self._pool.shape.layout,
            self._hot,
            self._layout,
            place,
        )
        rotated = self._index.key_space == "rotated"
        self._index.append(fresh.rotated_k if rotated else fresh.k, clock.positions)
        if self._lowrank is not None:
            self._lowrank.append(fresh.k, clock.positions)
        if self._tail is not None:
            self._tail.append(fresh.rotated_k, fresh.v, clock.positions)

    def _ids(self, fresh: Fresh, lengths: Tensor) -> Int32[Tensor, "B Hk K"]:
        query, scale = self._asked(fresh)
        scores = self._index.score(query, lengths, scale)
        if self._select is not None:
            return self._select(self._number, scores, lengths)
        return best_tokens(
            scores,
            lengths,
            self._policy,
            num_kv_heads=self._shape.num_kv_heads,
            scale=scale,
            unit=self._index.unit_tokens,
            outliers=self._index.outliers,
        )

    def _asked(self, fresh: Fresh) -> tuple[Float[Tensor, "B Hq D"], float]:
        """The queries in the index's key space, and the factor on their scores."""
        space = self._index.key_space
        if space == "rotated":
            return fresh.rotated_q, self._spec.scale
        scale = self._spec.scale * unturned(space, self._rope)
        if space == "unrotated":
            return fresh.q, scale
        turned = rotate_rows(fresh.q, fresh.k, *self._placed, interleaved=self._rope.interleaved)
        return turned[0], scale

    def _fetch(
        self, ids: Tensor, clock: Clock, blocks: Tensor, counts: Tensor | None = None
    ) -> Resolved:
        """Slots of tokens; what misses comes from the pool."""
        found = resolve(ids, self._there, clock.now, counts)
        pool = self._pool
        slab = pool.slab(self._number)
        gather(slab, blocks, pool.shape.layout, found, self._hot, self._layout)
        if self._lowrank is not None:
            self._lowrank.rebuild(found, self._hot, self._layout)
        return found
