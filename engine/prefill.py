"""Loop one: read a prompt, fill a cache."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_chunk
from engine.cache import Cache
from engine.loading import Loader
from engine.model import Model
from engine.rope import Tables


@torch.inference_mode()
def prefill(
    model: Model,
    cache: Cache,
    tokens: Int[Tensor, " T"],
    *,
    chunk: int = 512,
    loader: Loader | None = None,
    after_chunk: Callable[[], None] = lambda: None,
) -> Float[Tensor, " vocab"]:
    """Append `tokens`, at least one, to `cache`; returns the logits after the last of them."""
    last = torch.empty(0)
    for x in hidden_states(model, cache, tokens, chunk=chunk, loader=loader):
        last = x[-1:]
        after_chunk()
    return model.logits(last)[0]


@torch.inference_mode()
def hidden_states(
    model: Model,
    cache: Cache,
    tokens: Int[Tensor, " T"],
    *,
    chunk: int,
    loader: Loader | None = None,
) -> Iterator[Float[Tensor, "N E"]]:
    """The last layer's output for `tokens`, a chunk at a time, appending them to `cache`.

    `loader` puts the KV of the tokens before `cache.length` there, a layer at a time, just
    before the first chunk needs it.
    """
    for part in tokens.split(chunk):
        yield _chunk(model, cache, part, loader)


def _chunk(
    model: Model, cache: Cache, tokens: Int[Tensor, " N"], loader: Loader | None
) -> Float[Tensor, "N E"]:
    x = model.embed(tokens)
    positions = torch.arange(cache.length, cache.length + len(tokens), device=x.device)
    tables = Tables(positions)
    for i, layer in enumerate(model.layers):
        if loader is not None:
            loader.wait(i)
        q, k, v = layer.qkv(x)
        cache.observe(i, q)
        table = tables[layer.rope]
        seen = cache.append(i, k, layer.rope.rotate(k, table), v)
        heads = attend_chunk(layer.rope.rotate(q, table), seen.k, seen.v, layer.attention)
        x = layer.finish(x, heads)
    cache.advance(len(tokens))
    return x
