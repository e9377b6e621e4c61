"""One layer of one request in sparse decode: an index, and attention over what it chooses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_part, merge
from engine.cache import Query, SparseStats
from engine.kernels.attend_tail import attend_tail_native, can_estimate
from engine.kernels.attend_token import Partial, attend_rows_native
from engine.method import Method
from engine.model.pieces import AttentionSpec, Shape
from engine.model.rope import RUN_TOKENS, Rope
from engine.sparse.certified import SAMPLED, most_missed
from engine.sparse.choice import Choice
from engine.sparse.rows import SparseRows
from kvstore.block import LayerKV
from kvstore.pool.lease import Lease
from kvstore.pool.pool import Pool
from retrieval.estimate import Tail, draw


class SparseLayer:
    """KV of one layer, an index over its keys, and an estimate of what is not chosen, if wanted.

    `fill` takes the prompt, `append` the tokens that follow; `attend` what a query needs of them.

    Args:
        number: of the layer in its pool.
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
        self.rows = SparseRows(shape, spec, rope, method, lease, pool, number, self.stats)
        self.last: Query | None = None
        self.choice: Choice | None = None  # once there is a prompt
        self.tail: Tail | None = None
        self._shape, self._spec, self._rope, self._method = shape, spec, rope, method
        self._dice = torch.Generator(shape.device).manual_seed(number)  # what `certify` looks at

    @property
    def length(self) -> int:
        return self.rows.length

    @property
    def device_bytes(self) -> int:
        """Of everything but the pool."""
        parts = (self.choice, self.tail)
        return self.rows.nbytes + sum(part.nbytes for part in parts if part is not None)

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
            self.rows.factor(rotated)
        for start in range(0, length, RUN_TOKENS):
            part = slice(start, min(start + RUN_TOKENS, length))
            self._store(rotated[:, part], v[:, part])
        self.choice = Choice(self._method, self._shape, self._spec, self._rope, rotated, queries)
        if queries is not None:
            self.last = self._guess(length, queries)
        self.rows.warm(self.choice, rotated, v)

    def append(self, rotated: Float[Tensor, "Hk N D"], v: Float[Tensor, "Hk N D"]) -> None:
        """Take the KV of tokens that follow."""
        self._store(rotated, v)
        assert self.choice is not None, "fill() comes first"
        self.choice.append(rotated)

    def surrender(self) -> None:
        """Forget all but what the pool holds: a batch has the rest."""
        self.choice = self.tail = None
        self.rows.surrender()

    def _store(self, rotated: Tensor, v: Tensor) -> None:
        self.rows.store(rotated, v)
        if self._method.tail:
            self.tail = self.tail or self._new_tail()
            self.tail.append(rotated, v)

    def _new_tail(self) -> Tail:
        s = self._shape
        return Tail(s.num_kv_heads, s.head_dim, softcap=self._spec.softcap, device=s.device)

    def _guess(self, length: int, queries: Tensor) -> Query:
        """The prompt's last query: the first step's will be like it."""
        at = self._rope.table(torch.tensor([length - 1], device=queries.device))
        newest = queries[:, -1:]
        return Query(self._rope.rotate(newest, at)[:, 0], newest[:, 0])

    # what comes out

    def select(self, query: Query) -> Int[Tensor, "Hk K"]:
        """Tokens that matter to a query, ascending."""
        assert self.choice is not None, "fill() comes first"
        return self.choice.select(query)

    def prefetch(self, query: Query) -> None:
        """Bring here what a guessed query selects, and count what of it is used later."""
        if self.rows.moves:
            self.rows.bring(self.select(query))

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
        if kv is None and self.tail is None and self.rows.hot is None:
            return self.rows.attend_there(q, tokens)
        scale = self._spec.scale
        lying = self.rows.lying(tokens) if kv is None and self._compiled else None
        if lying is not None:
            if self.tail is None:
                return attend_rows_native(q, *lying, scale, self._spec.softcap)
            return attend_tail_native(q, self.tail, tokens, *lying, scale)
        kv = kv or self.rows.held(tokens)
        part = attend_part(q, kv.k, kv.v, self._spec)
        if self.tail is None:
            return part
        return merge([part, Partial(*self.tail.estimate(q, tokens, kv.k, kv.v, scale))])

    @property
    def _compiled(self) -> bool:
        """Whether compiled code knows what is to be made of rows where they lie."""
        s = self._shape
        return self.tail is None or can_estimate(self.tail, s.dtype, s.head_dim)

    def _enough(
        self, query: Query, tokens: Tensor, tolerated: float
    ) -> tuple[Int[Tensor, "Hk K"], LayerKV]:
        """These tokens, or twice as many, or more: until a sample says that they are enough."""
        assert self.choice is not None
        while True:
            hits, guessed = self.stats.hits, self.stats.guessed
            kv = self.rows.held(tokens)
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
        sample = self.rows.read(draw(tokens, length, SAMPLED, self._dice))
        ruled = (tokens < policy.sinks) | (tokens >= length - policy.window)
        best = (~ruled[0]).nonzero()[:, 0]  # rules put tokens at the same places in all heads
        return most_missed(q, chosen, sample.k, length - tokens.shape[1], self._spec, best)
