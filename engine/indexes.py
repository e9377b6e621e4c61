"""Indexes by name, for one layer of a model."""

from typing import Any

from engine.errors import ConfigError
from engine.method import Method
from engine.model import Shape
from retrieval.exact import Exact
from retrieval.index import KVIndex
from retrieval.landmarks import Landmarks
from retrieval.pq import PQIndex
from retrieval.quest import Quest
from retrieval.scalar import ScalarIndex
from retrieval.vq import VQIndex

INDEXES: dict[str, type[Any]] = {
    "exact": Exact,
    "landmarks": Landmarks,
    "quest": Quest,
    "vq": VQIndex,
    "pq": PQIndex,
    "scalar": ScalarIndex,
}


OUTLIER_SHARE = 6  # ShadowKV keeps 384 outliers of 2,464 tokens: a sixth


def make_index(method: Method, shape: Shape, budget: int) -> KVIndex:
    """An empty index for one layer. ConfigError for an option that it does not have.

    Outliers of landmarks are as many as its option says, but no more than a sixth of the budget.
    """
    kind, options = INDEXES[method.index], dict(method.options)
    if method.index == "landmarks":
        options["outlier_chunks"] = outlier_chunks(method, budget)
    try:
        made: KVIndex = kind(
            shape.num_kv_heads, shape.head_dim, shape.dtype, shape.device, **options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method.options of {method.index}: {error}") from error
    return made


def outlier_chunks(method: Method, budget: int) -> int:
    """Of landmarks: as many as asked for that fit a budget."""
    fit = budget // (OUTLIER_SHARE * int(method.options.get("chunk", 8)))
    return min(int(method.options.get("outlier_chunks", 48)), fit)
