"""A cache under observation: what each choice of tokens keeps of exact attention."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_part
from engine.cache import Cache, Query, SequenceCache, SparseStats
from engine.model.pieces import AttentionSpec
from engine.recorder import Recorder
from engine.sparse.cache import SparseCache
from evals.recall import mass
from kvstore.block import LayerKV
from retrieval.capped import capped
from retrieval.pending import products
from retrieval.select import Policy, top_tokens


class Kept(NamedTuple):
    """Of one query in one layer, or stacked over more; means over the query heads of a group.

    mass: attention on the tokens taken, 0..1.
    best: the same on as many tokens as the oracle takes under the same policy.
    error: |o - ô| / |o| of attention's output, against attention over everything there.
    """

    mass: Float[Tensor, "*at Hk"]
    best: Float[Tensor, "*at Hk"]
    error: Float[Tensor, "*at Hk"]


class Observed:
    """Goes on as the cache in it does, and sets exact attention beside each of its choices.

    Exact attention is that of the method's own queries over the method's own KV: what is observed
    is the loss of a step in its layer, not what the steps and layers before have lost.

    Args:
        exact: the same text, densely; its tokens from the cache's length on are overwritten.
        layers: those to observe: without windows, and selected in where the cache is sparse.
    """

    def __init__(self, cache: Cache, exact: SequenceCache, layers: list[int]) -> None:
        self._cache, self._exact = cache, exact
        self._found: dict[int, list[Kept]] = {i: [] for i in layers}

    @property
    def kept(self) -> Kept:
        """Of all steps so far: [steps, layers, KV heads]."""
        layers = [Kept(*map(torch.stack, zip(*x, strict=True))) for x in self._found.values()]
        return Kept(*(torch.stack(x, 1) for x in zip(*layers, strict=True)))

    def append(
        self,
        layer: int,
        k: Float[Tensor, "Hk N D"],
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV:
        """As the cache does."""
        if layer in self._found:
            self._exact.write(layer, self.length, rotated, v)
        return self._cache.append(layer, k, rotated, v)

    def attend(self, layer: int, query: Query, spec: AttentionSpec) -> Float[Tensor, "Hq D"]:
        """As the cache does; what it kept is noted."""
        out = self._cache.attend(layer, query, spec)
        if layer in self._found:
            kv = self._exact.view(layer, self.length + 1)
            if isinstance(self._cache, SparseCache):
                state = self._cache.layer(layer)
                assert state.choice is not None, "it has attended"
                tokens, policy = state.select(query), state.choice.policy
            else:
                tokens, policy = _everything(kv), Policy(kv.v.shape[1], sinks=0, window=1)
            self._found[layer].append(compare(query.rotated, out, tokens, kv, spec, policy))
        return out

    # the rest of what loops need

    @property
    def length(self) -> int:
        return self._cache.length

    @property
    def exact(self) -> int:
        return self._cache.exact

    @property
    def recorder(self) -> Recorder | None:
        return self._cache.recorder

    @property
    def stats(self) -> SparseStats | None:
        return self._cache.stats

    @property
    def wants_guess(self) -> bool:
        return self._cache.wants_guess

    def write(
        self, layer: int, start: int, rotated: Float[Tensor, "Hk N D"], v: Float[Tensor, "Hk N D"]
    ) -> LayerKV:
        return self._cache.write(layer, start, rotated, v)

    def view(self, layer: int, stop: int) -> LayerKV:
        return self._cache.view(layer, stop)

    def advance(self, count: int) -> None:
        self._cache.advance(count)

    def observe(self, layer: int, queries: Float[Tensor, "Hq N D"]) -> None:
        self._cache.observe(layer, queries)

    def finalize(self) -> None:
        self._cache.finalize()

    def look_ahead(self, layer: int, guess: Query | None) -> None:
        self._cache.look_ahead(layer, guess)

    def close(self) -> None:
        self._cache.close()


def compare(
    q: Float[Tensor, "Hq D"],
    out: Float[Tensor, "Hq D"],
    tokens: Int[Tensor, "Hk K"],
    kv: LayerKV,
    spec: AttentionSpec,
    policy: Policy,
) -> Kept:
    """What a choice of tokens, and the attention `out` that came of it, keep of attention to all.

    The oracle takes as many tokens by the true scores and the same policy, sinks and window
    included, as `method = exact` would.
    """
    assert kv.k is not None
    heads, length = kv.v.shape[:2]
    scores = products(q, kv.k)
    probs = capped(scores * spec.scale, spec.softcap).softmax(-1)
    as_many = max(tokens.shape[1], policy.sinks + policy.window)
    policy = replace(policy, budget=as_many, top_p=None)
    best = top_tokens(scores, policy, num_kv_heads=heads, length=length, scale=spec.scale)
    full = attend_part(q.float(), kv.k, kv.v, spec).out
    error = (out.float() - full).norm(dim=-1) / full.norm(dim=-1).clamp_min(1e-30)
    found = mass(probs, tokens), mass(probs, best), error
    return Kept(*(x.unflatten(0, (heads, -1)).mean(1) for x in found))


def _everything(kv: LayerKV) -> Int[Tensor, "Hk T"]:
    heads, length = kv.v.shape[:2]
    return torch.arange(length, device=kv.v.device).expand(heads, -1)
