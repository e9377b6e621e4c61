"""One layer of one request in sparse decode: its KV, its index, and attention over a choice."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from engine.attention import attend_part, merge
from engine.cache import Query, SparseStats
from engine.certified import SAMPLED, most_missed
from engine.choice import Choice
from engine.hot import HotBuffer
from engine.kernels.attend_tail import attend_tail_native, can_estimate
from engine.kernels.attend_token import (
    Partial,
    RowPlace,
    attend_rows_native,
    can_attend,
    row_place,
)
from engine.method import Method
from engine.model import AttentionSpec, Shape
from engine.rope import RUN_TOKENS, FarTable, Rope
from kvstore.block import LayerKV
from kvstore.lease import Lease
from kvstore.pool import Pool
from kvstore.rows import Raw, RowLayout
from retrieval.estimate import Tail, draw
from retrieval.lowrank import Gram, LowRankKeys


class Lying(NamedTuple):
    """Rows of chosen tokens, where they lie; see `engine.kernels.attend_token`."""

    rows: UInt8[Tensor, "N bytes"]
    chosen: Int[Tensor, "Hk K"]
    place: RowPlace


class SparseLayer:
    """KV of one layer in a pool, an index over its keys, and what is on the device of it.

    `fill` takes the prompt, `append` the tokens that follow; `attend` what a query needs of them.

    Args:
        number: of the layer in its pool.
        budget: tokens each KV head attends to; see `Method.tokens`.
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
    ) -> None:
        self.stats = SparseStats()
        self.last: Query | None = None
        self.choice: Choice | None = None  # once there is a prompt
        self.lowrank: LowRankKeys | None = None
        self.hot: HotBuffer | None = None
        self.tail: Tail | None = None
        self._shape, self._spec, self._rope, self._method = shape, spec, rope, method
        self._lease, self._pool, self._number = lease, pool, number
        self._far: FarTable | None = None
        self._dice = torch.Generator(shape.device).manual_seed(number)  # what `certify` looks at
        self._fresh: Tensor | None = None  # slots that a prefetch filled, until they are used

    @property
    def length(self) -> int:
        return self._lease.written(self._number)

    @property
    def device_bytes(self) -> int:
        """Of everything but the pool."""
        parts = (self.choice, self.hot, self.tail, self.lowrank, self._far)
        return sum(part.nbytes for part in parts if part is not None)

    # what goes in

    def fill(
        self,
        rotated: Float[Tensor, "Hk T D"],
        v: Float[Tensor, "Hk T D"],
        queries: Float[Tensor, "Hq N D"] | None = None,
    ) -> None:
        """Take the prompt's KV.

        Args:
            queries: unrotated queries of the prompt's last tokens, for indexes that learn from
                queries (VQ) and for the first guess.
        """
        length = v.shape[1]
        if self._method.keys == "lowrank":
            self._factor(rotated)
        for start in range(0, length, RUN_TOKENS):
            part = slice(start, min(start + RUN_TOKENS, length))
            self._store(start, rotated[:, part], v[:, part])
        self.choice = Choice(self._method, self._shape, self._spec, self._rope, rotated, queries)
        if queries is not None:
            self.last = self._guess(length, queries)
        if self._on_device:
            self._warm(rotated, v)

    def append(self, rotated: Float[Tensor, "Hk N D"], v: Float[Tensor, "Hk N D"]) -> None:
        """Take the KV of tokens that follow."""
        start = self.length
        self._store(start, rotated, v)
        assert self.choice is not None, "fill() comes first"
        self.choice.append(rotated)
        if self.hot is not None:
            tokens = torch.arange(start, start + v.shape[1], device=v.device)
            self.hot.insert(tokens.expand(len(v), -1), rotated, v)

    def surrender(self) -> None:
        """Forget all but what the pool holds: a batch has the rest."""
        self.choice = self.lowrank = self.hot = self.tail = self._far = None

    def _guess(self, length: int, queries: Tensor) -> Query:
        """The prompt's last query: the first step's will be like it."""
        at = self._rope.table(torch.tensor([length - 1], device=queries.device))
        newest = queries[:, -1:]
        return Query(self._rope.rotate(newest, at)[:, 0], newest[:, 0])

    def _store(self, start: int, rotated: Tensor, v: Tensor) -> None:
        self._lease.reserve(start + v.shape[1])
        self._lease.write(self._number, start, rotated, v)
        if self._method.tail:
            self.tail = self.tail or self._new_tail()
            self.tail.append(rotated, v)
        if self.lowrank is not None:
            self.lowrank.append(self._rope.unrotate(rotated, start))

    def _factor(self, rotated: Tensor) -> None:
        """The basis of the prompt's keys; they are projected on it as they are stored."""
        gram = Gram(self._shape.num_kv_heads, self._shape.head_dim, rotated.device)
        for start in range(0, rotated.shape[1], RUN_TOKENS):
            gram.accumulate(self._rope.unrotate(rotated[:, start : start + RUN_TOKENS], start))
        self.lowrank = LowRankKeys.from_gram(gram, rank=self._method.rank, dtype=self._shape.dtype)
        self._far = FarTable(self._rope, self._shape.max_positions)

    def _warm(self, rotated: Tensor, v: Tensor) -> None:
        """The buffer on the device, with what is attended to at every step: these are exact."""
        assert self.choice is not None
        policy = self.choice.policy
        s, length = self._shape, v.shape[1]
        slots = self._method.hot_slots(policy.budget, s.max_positions)
        self.hot = HotBuffer(s.num_kv_heads, slots, raw_rows(s), v.device)
        sinks = torch.arange(min(policy.sinks, length), device=v.device)
        ends = torch.arange(max(len(sinks), length - policy.window), length, device=v.device)
        self._insert(sinks.expand(len(v), -1), rotated, v, pinned=True)
        self._insert(self.choice.index.outliers, rotated, v, pinned=True)
        self._insert(ends.expand(len(v), -1), rotated, v, pinned=False)

    def _insert(self, tokens: Tensor, rotated: Tensor, v: Tensor, *, pinned: bool) -> None:
        assert self.hot is not None
        heads = torch.arange(len(v), device=v.device)[:, None]
        self.hot.insert(tokens, rotated[heads, tokens], v[heads, tokens], pinned=pinned)

    # what comes out

    @property
    def _on_device(self) -> bool:
        """Whether rows are fetched to the device: else attention goes where they are."""
        if self._method.attend_on != "auto":
            return self._method.attend_on == "device"
        return self._method.keys == "lowrank" or self._shape.device != self._pool.device

    def select(self, query: Query) -> Int[Tensor, "Hk K"]:
        """Tokens that matter to a query, ascending."""
        assert self.choice is not None, "fill() comes first"
        return self.choice.select(query)

    def attend(self, query: Query) -> Float[Tensor, "Hq D"]:
        """Attention of the newest token over what its query selects."""
        tokens, kv = self.select(query), None
        if self._method.certify is not None:
            tokens, kv = self._enough(query, tokens, self._method.certify)
        self.stats.steps += 1
        self.stats.selected += tokens.numel()
        self.last = query
        return self.attend_chosen(query.rotated, tokens, kv).out

    def attend_chosen(self, q: Tensor, tokens: Tensor, kv: LayerKV | None = None) -> Partial:
        """Attention over some tokens, ascending, and with a tail over an estimate of all else.

        Args:
            kv: of the tokens, if it is at hand.
        """
        if kv is None and self.tail is None and self.hot is None:
            return self.attend_there(q, tokens)
        scale, lying = self._spec.scale, self._lying(tokens) if kv is None else None
        if lying is not None:
            if self.tail is None:
                return attend_rows_native(q, *lying, scale)
            return attend_tail_native(q, self.tail, tokens, *lying, scale)
        kv = kv or self._held(tokens)
        part = attend_part(q, kv.k, kv.v, self._spec)
        if self.tail is None:
            return part
        return merge([part, Partial(*self.tail.estimate(q, tokens, kv.k, kv.v, scale))])

    def _enough(
        self, query: Query, tokens: Tensor, tolerated: float
    ) -> tuple[Int[Tensor, "Hk K"], LayerKV]:
        """These tokens, or twice as many, or more: until a sample says that they are enough."""
        assert self.choice is not None
        while True:
            hits, guessed = self.stats.hits, self.stats.guessed
            kv = self._held(tokens)
            more = min(2 * tokens.shape[1], self.length)
            if more == tokens.shape[1] or self._missed(query.rotated, tokens, kv.k) <= tolerated:
                return tokens, kv
            self.stats.hits, self.stats.guessed = hits, guessed  # of the last try alone
            self.stats.escalated += 1
            tokens = self.choice.select(query, more)

    def _missed(self, q: Tensor, tokens: Tensor, chosen: Tensor) -> float:
        """The most that a query head may miss of its attention with these tokens."""
        assert self.choice is not None
        policy, length = self.choice.policy, self.length
        sample = self._read(draw(tokens, length, SAMPLED, self._dice))
        ruled = (tokens < policy.sinks) | (tokens >= length - policy.window)
        best = (~ruled[0]).nonzero()[:, 0]  # rules put tokens at the same places in all heads
        return most_missed(q, chosen, sample.k, length - tokens.shape[1], self._spec, best)

    def _held(self, tokens: Tensor) -> LayerKV:
        """Rotated keys and values of what is selected, from the buffer if they fit there."""
        if self.hot is None or tokens.shape[1] > self.hot.num_slots:
            return self._read(tokens)
        kv = self.hot.read(self._fetch(tokens))
        assert kv.k is not None
        return LayerKV(kv.k, kv.v)

    def _new_tail(self) -> Tail:
        s = self._shape
        return Tail(s.num_kv_heads, s.head_dim, softcap=self._spec.softcap, device=s.device)

    def prefetch(self, query: Query) -> None:
        """Bring here what a guessed query selects, and count what of it is used later."""
        if self.hot is not None:
            self._fetch(self.select(query), guess=True)
        elif not self._pool.stationary:
            self._lease.promote(self._number, self.select(query).to(self._pool.device))

    def attend_there(self, q: Tensor, tokens: Tensor) -> Partial:
        """Where the KV lies: only the query and the result travel."""
        there = self._pool.device
        self.stats.host_key_rows += tokens.numel()
        place, tokens = self._place(self._pool.shape.layout, there), tokens.to(there)
        if place is not None and self._pool.stationary:
            rows, flat = self._lease.rows(tokens), self._pool.flat(self._number)
            part = attend_rows_native(q.to(there), flat, rows, place, self._spec.scale)
        else:
            kv = self._lease.gather(self._number, tokens)
            assert kv.k is not None
            part = attend_part(q.to(there), kv.k, kv.v, self._spec)
        return Partial(part.out.to(q.device), part.lse.to(q.device))

    def _lying(self, tokens: Tensor) -> Lying | None:
        """Rows of tokens where compiled code can take them: in the buffer, or else in the pool.

        None if there is none. What misses in the buffer is fetched.
        """
        here, tail = self._shape.device, self.tail
        layout = self._pool.shape.layout if self.hot is None else self.hot.layout
        place = self._place(layout, here)
        if place is None or not (tail is None or can_estimate(tail, place.dtype, layout.head_dim)):
            return None
        if self.hot is not None:
            return Lying(self.hot.flat, self.hot.numbers(self._fetch(tokens)), place)
        if self._pool.device != here or not self._pool.stationary:
            return None
        self.stats.host_key_rows += tokens.numel()
        return Lying(self._pool.flat(self._number), self._lease.rows(tokens), place)

    def _place(self, layout: RowLayout, device: torch.device) -> RowPlace | None:
        """None where rows must be decoded, or their numbers are not for compiled code."""
        place = row_place(layout)
        if place is None or self._spec.softcap is not None:
            return None
        return place if can_attend(place.dtype, self._shape.head_dim, device) else None

    def _fetch(self, tokens: Tensor, *, guess: bool = False) -> Int[Tensor, "Hk K"]:
        """Slots of the hot buffer that hold these tokens; what misses comes from the pool."""
        assert self.hot is not None
        slots, miss = self.hot.resolve(tokens)
        self._count(slots, miss, guess)
        most = int(miss.sum(1).max())
        if most:
            order = miss.long().topk(most, 1).indices
            wanted = tokens.gather(1, order)  # rows of heads that miss less are read in vain
            kv = self._read(wanted)
            real = miss.gather(1, order)
            heads = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(real)[real]
            rows = self.hot.layout.encode(kv.k, kv.v)
            self.hot.write(slots.gather(1, order)[real], heads, rows[real])
        return slots

    def _count(self, slots: Tensor, miss: Tensor, guess: bool) -> None:
        assert self.hot is not None
        missed = int(miss.sum())
        layout = self._pool.shape.layout
        self.stats.fetched_bytes += missed * layout.row_bytes
        self.stats.host_key_rows += missed if layout.k is not None else 0
        size = (len(slots), self.hot.num_slots)
        if self._fresh is None:
            self._fresh = torch.zeros(size, dtype=torch.bool, device=slots.device)
        heads = torch.arange(len(slots), device=slots.device)[:, None]
        if guess:
            self._fresh[heads, slots] |= miss
            return
        self.stats.hits += miss.numel() - missed
        self.stats.guessed += int((self._fresh[heads, slots] & ~miss).sum())
        self._fresh.zero_()

    def _read(self, tokens: Int[Tensor, "Hk K"]) -> LayerKV:
        """Rotated keys and values of tokens, on the device."""
        kv = self._lease.gather(self._number, tokens.to(self._pool.device))
        v = kv.v.to(self._shape.device)
        if kv.k is not None:
            return LayerKV(kv.k.to(self._shape.device), v)
        assert self.lowrank is not None
        assert self._far is not None
        keys = self.lowrank.rows(tokens).to(v.dtype)
        table = self._far.table(tokens.flatten())
        return LayerKV(self._rope.rotate(keys.flatten(0, 1)[None], table)[0].view_as(v), v)


def raw_rows(shape: Shape) -> RowLayout:
    """Keys and values as numbers of the model's dtype, side by side: ready to attend to."""
    return RowLayout(Raw(shape.dtype), Raw(shape.dtype), shape.head_dim, shape.dtype)
