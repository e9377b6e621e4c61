"""Loop two: one token in, one out, for every running request at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.cache import Cache
from engine.model.pieces import Model
from engine.step import Piece, hidden, raise_error


@torch.inference_mode()
def decode(
    model: Model, caches: Sequence[Cache], tokens: Int[Tensor, " B"]
) -> Float[Tensor, "B vocab"]:
    """Append `tokens[b]` to `caches[b]`; returns each request's next-token logits.

    Requests may be of any length: projections and MLP run over the batch, attention per request.
    While a layer computes, the next one's cache may fetch what it is likely to need.
    """
    one_each = zip(caches, tokens.split(1), strict=True)
    pieces = [Piece(cache, token, prompt=False) for cache, token in one_each]
    x = hidden(model, pieces)
    raise_error(pieces)
    for cache in caches:
        cache.advance(1)
    return model.logits(x)
