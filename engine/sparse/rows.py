"""Where the keys and values of one layer lie in sparse decode, and how chosen ones are had."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from engine.attention import attend_part
from engine.cache import SparseStats
from engine.kernels.attend_token import (
    Partial,
    RowPlace,
    attend_rows_native,
    can_attend,
    row_place,
)
from engine.method import Method
from engine.model.pieces import AttentionSpec, Shape
from engine.model.rope import RUN_TOKENS, FarTable, Rope
from engine.sparse.choice import Choice
from engine.sparse.hot import HotBuffer
from kvstore.block import LayerKV
from kvstore.pool.lease import Lease
from kvstore.pool.pool import Pool
from kvstore.rows import Raw, RowLayout
from retrieval.lowrank import Gram, LowRankKeys


class Lying(NamedTuple):
    """Rows of chosen tokens, where they lie; see `engine.kernels.attend_token`."""

    rows: UInt8[Tensor, "N bytes"]
    chosen: Int[Tensor, "Hk K"]
    place: RowPlace


class SparseRows:
    """A layer's KV: all of it in a pool, and on the device low-rank keys and a buffer, if wanted.

    Args:
        number: of the layer in its pool.
        stats: what is fetched is counted there.
    """

    def __init__(
        self,
        shape: Shape,
        spec: AttentionSpec,
        rope: Rope,
        method: Method,
        lease: Lease,
        pool: Pool,
        number: int,
        stats: SparseStats,
    ) -> None:
        self.lowrank: LowRankKeys | None = None
        self.hot: HotBuffer | None = None
        self._shape, self._spec, self._rope, self._method = shape, spec, rope, method
        self._lease, self._pool, self._number, self._stats = lease, pool, number, stats
        self._far: FarTable | None = None
        self._fresh: Tensor | None = None  # slots that a prefetch filled, until they are used

    @property
    def length(self) -> int:
        return self._lease.written(self._number)

    @property
    def nbytes(self) -> int:
        """On the device: of everything but the pool."""
        parts = (self.hot, self.lowrank, self._far)
        return sum(part.nbytes for part in parts if part is not None)

    # what goes in

    def factor(self, rotated: Float[Tensor, "Hk T D"]) -> None:
        """Find the basis of a prompt's keys; they are projected on it as they are stored."""
        gram = Gram(self._shape.num_kv_heads, self._shape.head_dim, rotated.device)
        for start in range(0, rotated.shape[1], RUN_TOKENS):
            gram.accumulate(self._rope.unrotate(rotated[:, start : start + RUN_TOKENS], start))
        self.lowrank = LowRankKeys.from_gram(gram, rank=self._method.rank, dtype=self._shape.dtype)
        self._far = FarTable(self._rope, self._shape.max_positions)

    def store(self, rotated: Float[Tensor, "Hk N D"], v: Float[Tensor, "Hk N D"]) -> None:
        """The next N tokens go to the pool, and once there is a buffer, to that too."""
        start = self.length
        self._lease.reserve(start + v.shape[1])
        self._lease.write(self._number, start, rotated, v)
        if self.lowrank is not None:
            self.lowrank.append(self._rope.unrotate(rotated, start))
        if self.hot is not None:
            tokens = torch.arange(start, start + v.shape[1], device=v.device)
            self.hot.insert(tokens.expand(len(v), -1), rotated, v)

    def warm(self, choice: Choice, rotated: Tensor, v: Tensor) -> None:
        """Where attention is computed on the device, begin the buffer there with what is attended
        to at every step: these rows are exact."""
        if not self._on_device:
            return
        policy, s, length = choice.policy, self._shape, v.shape[1]
        slots = self._method.hot_slots(policy.budget, s.max_positions)
        self.hot = HotBuffer(s.num_kv_heads, slots, raw_rows(s), v.device)
        sinks = torch.arange(min(policy.sinks, length), device=v.device)
        ends = torch.arange(max(len(sinks), length - policy.window), length, device=v.device)
        self._insert(sinks.expand(len(v), -1), rotated, v, pinned=True)
        self._insert(choice.index.outliers, rotated, v, pinned=True)
        self._insert(ends.expand(len(v), -1), rotated, v, pinned=False)

    def _insert(self, tokens: Tensor, rotated: Tensor, v: Tensor, *, pinned: bool) -> None:
        assert self.hot is not None
        heads = torch.arange(len(v), device=v.device)[:, None]
        self.hot.insert(tokens, rotated[heads, tokens], v[heads, tokens], pinned=pinned)

    def surrender(self) -> None:
        """Forget all but what the pool holds."""
        self.lowrank = self.hot = self._far = None

    @property
    def _on_device(self) -> bool:
        """Whether rows are fetched to the device: else attention goes where they are."""
        return self._method.fetches(self._shape.device != self._pool.device)

    @property
    def moves(self) -> bool:
        """Whether rows are brought to where they are attended to: from the pool, or from disk."""
        return self.hot is not None or not self._pool.stationary

    # what comes out

    def held(self, tokens: Int[Tensor, "Hk K"]) -> LayerKV:
        """Rotated keys and values of tokens on the device, from the buffer if they fit there."""
        if self.hot is None or tokens.shape[1] > self.hot.num_slots:
            return self.read(tokens)
        kv = self.hot.read(self._fetch(tokens))
        assert kv.k is not None
        return LayerKV(kv.k, kv.v)

    def read(self, tokens: Int[Tensor, "Hk K"]) -> LayerKV:
        """Rotated keys and values of tokens on the device, from the pool."""
        kv = self._lease.gather(self._number, tokens.to(self._pool.device))
        v = kv.v.to(self._shape.device)
        if kv.k is not None:
            return LayerKV(kv.k.to(self._shape.device), v)
        assert self.lowrank is not None
        assert self._far is not None
        keys = self.lowrank.rows(tokens).to(v.dtype)
        table = self._far.table(tokens.flatten())
        return LayerKV(self._rope.rotate(keys.flatten(0, 1)[None], table)[0].view_as(v), v)

    def bring(self, tokens: Int[Tensor, "Hk K"]) -> None:
        """Have tokens near that somebody guesses to be wanted, and count which of them are."""
        if self.hot is not None:
            self._fetch(tokens, guess=True)
        else:
            self._lease.promote(self._number, tokens.to(self._pool.device))

    def lying(self, tokens: Int[Tensor, "Hk K"]) -> Lying | None:
        """Rows of tokens where compiled code can take them: in the buffer, or else in the pool.

        None if there is none. What misses in the buffer is fetched.
        """
        here = self._shape.device
        layout = self._pool.shape.layout if self.hot is None else self.hot.layout
        place = self._place(layout, here)
        if place is None:
            return None
        if self.hot is not None:
            return Lying(self.hot.flat, self.hot.numbers(self._fetch(tokens)), place)
        if self._pool.device != here or not self._pool.stationary:
            return None
        self._stats.host_key_rows += tokens.numel()
        return Lying(self._pool.flat(self._number), self._lease.rows(tokens), place)

    def attend_there(self, q: Float[Tensor, "Hq D"], tokens: Int[Tensor, "Hk K"]) -> Partial:
        """Attention over tokens where the pool is: only the query and the result travel."""
        there = self._pool.device
        self._stats.host_key_rows += tokens.numel()
        place, tokens = self._place(self._pool.shape.layout, there), tokens.to(there)
        if place is not None and self._pool.stationary:
            rows, flat = self._lease.rows(tokens), self._pool.flat(self._number)
            scale, softcap = self._spec.scale, self._spec.softcap
            part = attend_rows_native(q.to(there), flat, rows, place, scale, softcap)
        else:
            kv = self._lease.gather(self._number, tokens)
            assert kv.k is not None
            part = attend_part(q.to(there), kv.k, kv.v, self._spec)
        return Partial(part.out.to(q.device), part.lse.to(q.device))

    def _place(self, layout: RowLayout, device: torch.device) -> RowPlace | None:
        """None where rows must be decoded, or their numbers are not for compiled code."""
        place = row_place(layout)
        known = place is not None and can_attend(place.dtype, self._shape.head_dim, device)
        return place if known else None

    def _fetch(self, tokens: Tensor, *, guess: bool = False) -> Int[Tensor, "Hk K"]:
        """Slots of the hot buffer that hold these tokens; what misses comes from the pool."""
        assert self.hot is not None
        slots, miss = self.hot.resolve(tokens)
        self._count(slots, miss, guess)
        most = int(miss.sum(1).max())
        if most:
            order = miss.long().topk(most, 1).indices
            wanted = tokens.gather(1, order)  # rows of heads that miss less are read in vain
            kv = self.read(wanted)
            real = miss.gather(1, order)
            heads = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(real)[real]
            rows = self.hot.layout.encode(kv.k, kv.v)
            self.hot.write(slots.gather(1, order)[real], heads, rows[real])
        return slots

    def _count(self, slots: Tensor, miss: Tensor, guess: bool) -> None:
        assert self.hot is not None
        missed = int(miss.sum())
        layout = self._pool.shape.layout
        self._stats.fetched_bytes += missed * layout.row_bytes
        self._stats.host_key_rows += missed if layout.k is not None else 0
        size = (len(slots), self.hot.num_slots)
        if self._fresh is None:
            self._fresh = torch.zeros(size, dtype=torch.bool, device=slots.device)
        heads = torch.arange(len(slots), device=slots.device)[:, None]
        if guess:
            self._fresh[heads, slots] |= miss
            return
        self._stats.hits += miss.numel() - missed
        self._stats.guessed += int((self._fresh[heads, slots] & ~miss).sum())
        self._fresh.zero_()


def raw_rows(shape: Shape) -> RowLayout:
    """Keys and values as numbers of the model's dtype, side by side: ready to attend to."""
    return RowLayout(Raw(shape.dtype), Raw(shape.dtype), shape.head_dim, shape.dtype)
