"""Loop two: one token in, one out, for every running request at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.cache import Cache, Query
from engine.model import Model
from engine.rope import Tables


@torch.inference_mode()
def decode(
    model: Model, caches: Sequence[Cache], tokens: Int[Tensor, " B"]
) -> Float[Tensor, "B vocab"]:
    """Append `tokens[b]` to `caches[b]`; returns each request's next-token logits.

    Requests may be of any length: projections and MLP run over the batch, attention per request.
    While a layer computes, the next one's cache may fetch what it is likely to need.
    """
    x = model.embed(tokens)
    tables = Tables(torch.tensor([cache.length for cache in caches], device=x.device))
    for i, layer in enumerate(model.layers):
        guesses = _guesses(model, i + 1, x, tables, caches)
        for cache, guess in zip(caches, guesses, strict=True):
            cache.look_ahead(i + 1, guess)
        q, k, v = layer.qkv(x)
        turned = layer.rope.rotate(torch.cat([q, k]), tables[layer.rope])
        rotated_q, rotated = turned.split([len(q), len(k)])
        heads = []
        for b, cache in enumerate(caches):
            one = slice(b, b + 1)
            cache.append(i, k[:, one], rotated[:, one], v[:, one])
            heads.append(cache.attend(i, Query(rotated_q[:, b], q[:, b]), layer.attention))
        x = layer.finish(x, torch.stack(heads, 1))
    for cache in caches:
        cache.advance(1)
    return model.logits(x)


def _guesses(
    model: Model, layer: int, x: Tensor, tables: Tables, caches: Sequence[Cache]
) -> list[Query | None]:
    """What a layer's queries may be, a layer before: its projections of what is there now.

    The residual stream changes little from one layer to the next (InfiniGen, Lee et al. 2024).
    """
    if layer == len(model.layers) or not any(cache.wants_guess for cache in caches):
        return [None] * len(caches)
    piece = model.layers[layer]
    q = piece.qkv(x).q
    rotated = piece.rope.rotate(q, tables[piece.rope])
    return [Query(rotated[:, b], q[:, b]) for b in range(len(caches))]
