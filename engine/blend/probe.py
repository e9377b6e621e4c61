"""What the question attends to among reused KV, before any of it is repaired."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from engine.blend.active import Active
from engine.blend.reuse import FRESH, Reuse
from engine.cache import Cache
from engine.loading import Loader
from engine.model.pieces import AttentionSpec, Model, kv_depth
from retrieval.capped import capped

ASKING = 64  # tokens of the prompt's end whose attention counts
DEPTH = 0.5  # share of the layers that are looked at
FORWARD = 8  # tokens behind one that count as attended to: a sentence goes on, into another block


class Probe:
    """The attention of the last tokens on every block, in the first layers (QCFuse, 2026).

    Tokens without KV run over the stored KV as it is; what they leave in the cache there is
    overwritten when they are computed again.
    """

    def __init__(self, model: Model, cache: Cache, reuse: Reuse, loader: Loader) -> None:
        self._model, self._cache, self._reuse, self._loader = model, cache, reuse, loader
        self._active = Active(model, reuse, reuse.active(~reuse.everything))
        self._layers = _layers(model)

    def relevance(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, " n"]:
        """Per block, the attention of the head that looks there most, mean of the layers."""
        active = self._active
        asking = min(ASKING, _tail(active.positions, len(tokens)))
        x, found = self._model.embed(tokens[active.positions]), []
        for layer in self._model.layers[: self._layers]:
            if layer.owns:
                self._loader.wait(layer.owner)
            fresh, kv = layer.qkv(x), self._cache.view(layer.owner, len(tokens))
            q, k = active.rotate(layer, fresh.q), active.rotate(layer, fresh.k)
            active.write(layer, self._cache, kv, fresh, k)
            mass = attention_mass(q[:, -asking:], kv.k, layer.attention)
            found.append(self._reuse.sum(_spread(mass)).amax(0))
            x = layer.finish(x, active.attend(layer, q, kv))
        return torch.stack(found).mean(0)


def probe_cost(model: Model, reuse: Reuse) -> int:
    """Tokens whose projections a probe computes, times the layers."""
    return reuse.count(FRESH) * _layers(model)


def _layers(model: Model) -> int:
    return max(1, round(DEPTH * kv_depth(model)))


def _tail(positions: Int[Tensor, " n"], length: int) -> int:
    """How many of the positions are the last ones of the prompt, without a gap."""
    ends = torch.arange(length - len(positions), length, device=positions.device)
    return int((positions == ends).sum())


def _spread(mass: Float[Tensor, "Hq N"]) -> Float[Tensor, "Hq N"]:
    """Each token's mass, or that of one up to `FORWARD` before it (as SnapKV, Li et al. 2024)."""
    return F.max_pool1d(F.pad(mass[None], (FORWARD, 0)), FORWARD + 1, stride=1)[0]


def attention_mass(
    q: Float[Tensor, "Hq m D"], k: Float[Tensor, "Hk N D"], spec: AttentionSpec
) -> Float[Tensor, "Hq N"]:
    """What share of the attention of the last m of N tokens each token gets, by query head."""
    n, m = k.shape[1], q.shape[1]
    row = torch.arange(n - m, n, device=k.device)[:, None]
    column = torch.arange(n, device=k.device)
    hidden = column > row if spec.window is None else (column > row) | (column <= row - spec.window)
    mass = []
    for i, query in enumerate(q):  # one after the other: memory is that of one head's scores
        scores = capped((query @ k[i * len(k) // len(q)].T).float() * spec.scale, spec.softcap)
        mass.append(scores.masked_fill_(hidden, float("-inf")).softmax(-1).mean(0))
    return torch.stack(mass)
