"""What steps of decode cost: tokens attended to, bytes moved, bytes of indexes."""

from typing import TypedDict

from engine.cache import Cache
from engine.method import Method
from engine.model.pieces import Model
from engine.sparse.cache import SparseCache, pool_shape, sparse_layers
from engine.sparse.layer import SparseLayer


class Cost(TypedDict, total=False):
    """Fields of a `Record`; empty for a model none of whose layers can select."""

    kept_tokens: float
    bytes_moved: float
    index_bytes: float


def cost(model: Model, cache: Cache, context: int) -> Cost:
    """Of all steps since a context of so many tokens, of which there was at least one.

    Layers with a sliding window, and those that the method leaves dense, are not counted.
    """
    if isinstance(cache, SparseCache):
        return _sparse(model, cache, context)
    layers = sparse_layers(model, Method(index="exact"))
    if not layers:
        return Cost()
    steps = cache.length - context
    attended = context + (steps + 1) / 2  # a step attends to its own token, too
    moved = attended * model.shape.kv_bytes_per_token * len(layers) / model.shape.num_layers
    return Cost(kept_tokens=attended, bytes_moved=moved, index_bytes=0.0)


def _sparse(model: Model, cache: SparseCache, context: int) -> Cost:
    numbers = sparse_layers(model, cache.method)
    layers, heads = [cache.layer(i) for i in numbers], model.shape.num_kv_heads
    row_bytes = pool_shape(model, cache.method).layout.row_bytes
    steps, selected = cache.stats.steps, cache.stats.selected
    return Cost(
        kept_tokens=selected / steps / heads / len(layers),
        bytes_moved=sum(_moved(layer, row_bytes) for layer in layers) / steps,
        index_bytes=sum(map(_index_bytes, layers)) / len(layers) / heads / context,
    )


def _moved(layer: SparseLayer, row_bytes: int) -> int:
    """Bytes that were fetched to the device, or attended to where they rest."""
    if layer.rows.hot is not None:
        return layer.stats.fetched_bytes
    return layer.stats.selected * row_bytes


def _index_bytes(layer: SparseLayer) -> int:
    """What stays on the device to choose tokens, and to do without their keys."""
    parts = (layer.choice, layer.rows.lowrank, layer.tail)
    return sum(part.nbytes for part in parts if part is not None)
