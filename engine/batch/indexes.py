"""Indexes of a batch by name, for one layer of a model: `engine.sparse.indexes`, on a device."""

from collections.abc import Callable
from typing import Any

from engine.method import Method
from engine.model.pieces import Shape
from engine.sparse.indexes import make_index, outlier_chunks
from retrieval.device.index import DeviceIndex
from retrieval.device.pq import DevicePQ4, DevicePQ8
from retrieval.device.rows import BOUNDS, KEYS, LANDMARKS, DeviceRows
from retrieval.device.scalar import DeviceScalar
from retrieval.device.vq import DeviceVQ
from retrieval.index import IndexSpec

Size = tuple[int, int, int, int]  # slots, KV heads, head_dim, tokens


def device_index(
    method: Method, shape: Shape, slots: int, capacity: int, budget: int
) -> DeviceIndex:
    """Room for the index of one layer of every slot. ConfigError for an option it does not have."""
    spec = make_index(method, shape, budget).spec  # refuses what there is not
    size = (slots, shape.num_kv_heads, shape.head_dim, capacity)
    return MAKE[method.index](size, shape, spec, method, budget)


def _rows(kind: Any) -> Callable[..., DeviceIndex]:
    def make(size: Size, s: Shape, spec: IndexSpec, method: Method, budget: int) -> DeviceIndex:
        outliers = outlier_chunks(method, budget) if kind is LANDMARKS else 0
        unit = spec.unit_tokens
        return DeviceRows(kind, *size, s.dtype, s.device, unit=unit, outlier_units=outliers)

    return make


def _scalar(size: Size, s: Shape, spec: IndexSpec, method: Method, _: int) -> DeviceIndex:
    bits: Any = method.options.get("bits", 2)
    return DeviceScalar(*size, s.dtype, s.device, bits=bits, key_space=spec.key_space)


def _vq(size: Size, s: Shape, spec: IndexSpec, method: Method, _: int) -> DeviceIndex:
    most = int(method.options.get("centroids", 1024))
    return DeviceVQ(*size, s.dtype, s.device, key_space=spec.key_space, centroids=most)


def _pq(size: Size, s: Shape, spec: IndexSpec, method: Method, _: int) -> DeviceIndex:
    cut: dict[str, Any] = {"subspaces": int(method.options.get("subspaces", 16))}
    cut["key_space"] = spec.key_space
    if method.options.get("bits", 8) == 8:
        return DevicePQ8(*size, s.device, **cut)
    return DevicePQ4(*size, s.dtype, s.device, **cut)


MAKE: dict[str, Callable[..., DeviceIndex]] = {
    "scalar": _scalar,
    "landmarks": _rows(LANDMARKS),
    "quest": _rows(BOUNDS),
    "exact": _rows(KEYS),
    "vq": _vq,
    "pq": _pq,
}
