"""Indexes by name, for one layer of a model."""

import inspect
from collections.abc import Mapping
from math import inf
from typing import Any, get_args

from engine.errors import ConfigError
from engine.method import MOST, Method
from engine.model.pieces import Shape
from retrieval.exact import Exact
from retrieval.index import KeySpace, KVIndex
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


LEAST = {  # of options that are whole numbers
    "chunk": 1, "page": 1, "centroids": 1, "points": 1, "iterations": 1, "subspaces": 1, "bits": 1,
    "outlier_chunks": 0, "seed": 0,
}  # fmt: skip
PARTS = {"codebook", "guard"}  # which code gives an index, and no setting can
OUTLIER_SHARE = 6  # ShadowKV keeps 384 outliers of 2,464 tokens: a sixth


def make_index(method: Method, shape: Shape, budget: int) -> KVIndex:
    """An empty index for one layer. ConfigError for an option that it does not have.

    Outliers of landmarks are as many as its option says, but no more than a sixth of the budget.
    """
    kind, options = INDEXES[method.index], dict(method.options)
    try:
        _check(kind, options)
        if method.index == "landmarks":
            options["outlier_chunks"] = outlier_chunks(method, budget)
        made: KVIndex = kind(
            shape.num_kv_heads, shape.head_dim, shape.dtype, shape.device, **options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method.options of {method.index}: {error}") from error
    return made


def _check(kind: type[Any], options: Mapping[str, int | float | str]) -> None:
    parameters = inspect.signature(kind).parameters.values()
    own = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY} - PARTS
    for name, value in options.items():
        if name not in own:
            raise ValueError(
                f"{name} is no option of it: {', '.join(sorted(own)) or 'it has none'}"
            )
        least = LEAST.get(name)
        if least is not None and (type(value) is not int or not least <= value < MOST):
            raise ValueError(f"{name} is a whole number from {least} to {MOST - 1}, got {value!r}")
        if name == "ridge" and (isinstance(value, str) or not 0 < value < inf):
            raise ValueError(f"{name} is a number above 0, got {value!r}")
        if name == "key_space" and value not in get_args(KeySpace):
            raise ValueError(f"{name} is one of {', '.join(get_args(KeySpace))}, got {value!r}")


def outlier_chunks(method: Method, budget: int) -> int:
    """Of landmarks: as many as asked for that fit a budget."""
    chunk = int(method.options.get("chunk", 8))
    fit = min(budget // (OUTLIER_SHARE * chunk), (budget - method.sinks - method.window) // chunk)
    return min(int(method.options.get("outlier_chunks", 48)), fit)
