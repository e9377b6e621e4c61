"""Loop two: one token in, one out, for every running request at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_token
from engine.cache import SequenceCache
from engine.model import Model
from engine.rope import Tables


@torch.inference_mode()
def decode(
    model: Model, caches: Sequence[SequenceCache], tokens: Int[Tensor, " B"]
) -> Float[Tensor, "B vocab"]:
    """Append `tokens[b]` to `caches[b]`; returns each request's next-token logits.

    Requests may be of any length: projections and MLP run over the batch, attention per request.
    """
    x = model.embed(tokens)
    tables = Tables(torch.tensor([cache.length for cache in caches], device=x.device))
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv(x)
        turned = layer.rope.rotate(torch.cat([q, k]), tables[layer.rope])
        q, rotated = turned.split([len(q), len(k)])
        heads = []
        for b, cache in enumerate(caches):
            one = slice(b, b + 1)
            seen = cache.append(i, k[:, one], rotated[:, one], v[:, one])
            heads.append(attend_token(q[:, b], seen.k, seen.v, layer.attention))
        x = layer.finish(x, torch.stack(heads, 1))
    for cache in caches:
        cache.advance(1)
    return model.logits(x)
