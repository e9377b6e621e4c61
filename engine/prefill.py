"""Loop one: read a prompt, fill a cache; chunk by chunk, or layer by layer."""

from collections import Counter
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_chunk
from engine.cache import Cache
from engine.loading import Loader
from engine.model.pieces import Layer, Model, kv_depth
from engine.model.rope import Tables
from engine.slices import Slices, drained
from engine.sparse.cache import SparseCache
from engine.step import Piece, hidden, raise_error


@torch.inference_mode()
def prefill(
    model: Model,
    cache: Cache,
    tokens: Int[Tensor, " T"],
    *,
    chunk: int = 512,
    loader: Loader | None = None,
) -> Float[Tensor, " vocab"]:
    """Append `tokens`, at least one, to `cache`; returns the logits after the last of them."""
    last = torch.empty(0)
    for x in hidden_states(model, cache, tokens, chunk=chunk, loader=loader, ends=True):
        last = x
    return model.logits(last)[0]


def prefill_layers(
    model: Model, cache: SparseCache, tokens: Int[Tensor, " T"], *, chunk: int
) -> Float[Tensor, " vocab"]:
    """`layer_slices` at once, for benchmarks and tests."""
    return drained(layer_slices(model, cache, tokens, chunk=chunk))


def layer_slices(
    model: Model,
    cache: SparseCache,
    tokens: Int[Tensor, " T"],
    *,
    chunk: int,
    loader: Loader | None = None,
) -> Slices[Float[Tensor, " vocab"]]:
    """As `prefill`, but a layer reads all tokens before the next one reads any; a slice is a chunk
    in one layer.

    Each layer's KV moves to the pool as soon as it is complete, and read by all that share it. So
    the device holds, of layers whose tokens are selected, the KV of one at a time, and beside it
    the hidden states of all tokens with the tables of their rotations. Every chunk meets what it
    meets in `prefill`, so the results are equal. Blocks are complete in the last layer only: the
    recorder holds them all.
    """
    x, start = model.embed(tokens), cache.length
    runs = range(start, start + len(x), chunk)
    positions = torch.arange(start, start + len(x), device=x.device)
    tables = [Tables(part) for part in positions.split(chunk)]
    readers = Counter(layer.owner for layer in model.layers)  # of each layer's KV, still to come
    depth = kv_depth(model)
    for i, layer in enumerate(model.layers):
        if i == depth:  # nothing is wanted any more but the logits
            x, runs, tables = x[-1:], range(runs.stop - 1, runs.stop), [Tables(positions[-1:])]
        if loader is not None and layer.owns:
            loader.wait(layer.owner)
        for at, part, table in zip(runs, x.split(chunk), tables, strict=True):
            part.copy_(_layer(layer, cache, part, at, table))
            yield len(part) // len(model.layers)
        readers[layer.owner] -= 1
        if not readers[layer.owner]:
            cache.complete(layer.owner, start + len(tokens))
    cache.advance(len(tokens))
    return model.logits(x[-1:])[0]


@torch.inference_mode()
def hidden_states(
    model: Model,
    cache: Cache,
    tokens: Int[Tensor, " T"],
    *,
    chunk: int,
    loader: Loader | None = None,
    ends: bool = False,
) -> Iterator[Float[Tensor, "N E"]]:
    """The last layer's output for `tokens`, a chunk at a time, appending them to `cache`.

    Args:
        loader: puts the KV of the tokens before `cache.length` there, a layer at a time, just
            before the first chunk needs it.
        ends: only for the last token of each chunk.
    """
    for part in tokens.split(chunk):
        piece = Piece(cache, part, prompt=True, loader=loader)
        x = hidden(model, [piece], ends=ends)
        raise_error([piece])
        cache.advance(len(part))
        yield x


def _layer(
    layer: Layer, cache: Cache, x: Float[Tensor, "N E"], start: int, tables: Tables
) -> Float[Tensor, "N E"]:
    """What a layer makes of the tokens from `start` on; its KV goes to the cache."""
    (q, k, v), table, number = layer.qkv(x), tables[layer.rope], layer.owner
    if layer.owns:
        cache.observe(number, q)
        if cache.recorder is not None:
            cache.recorder.write(number, start, k, v)
        seen = cache.write(number, start, layer.rope.rotate(k, table), v)
    else:
        seen = cache.view(number, start + len(x))
    heads = attend_chunk(layer.rope.rotate(q, table), seen.k, seen.v, layer.attention)
    return layer.finish(x, heads)
