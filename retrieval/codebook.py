"""Codebooks: k-means by FAISS, which only this file knows; coding and score tables in torch."""

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from retrieval.index import State
from retrieval.metric import Metric

RUN_ELEMENTS = 1 << 21  # distances held at once while coding: 8 MiB
RUN_TOKENS = 1 << 13  # keys moved to the metric at once
BLAS_FROM = 20  # queries: FAISS's own setting until 1.15, since when k-means takes 12 times as long
GPU_BYTES = 256 << 20  # that FAISS may take on a GPU while it trains; it would take 1.5 GiB


@dataclass(frozen=True, slots=True)
class Training:
    """How much work k-means is given.

    Args:
        points: keys per centroid at most, drawn evenly from all.
        iterations: of Lloyd's algorithm.
        seed: of the draw and of the first centroids; the same keys give the same codebook.
    """

    points: int = 64
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 1 or self.iterations < 1:
            raise ValueError(
                f"need points >= 1 and iterations >= 1, got {self.points}, {self.iterations}"
            )


class Codes(NamedTuple):
    """The nearest centroid of every key and sub-space, and the squared distances added up."""

    codes: Int[Tensor, "Hk N M"]
    errors: Float[Tensor, "Hk N"]  # in the metric: relative to the error of a score


class Codebook(NamedTuple):
    """Centroids of M sub-spaces of the metric, M = 1 for vector quantization.

    A head with fewer centroids than another repeats its last one, which no key is coded as.
    """

    centroids: Float[Tensor, "Hk M C S"]
    metric: Metric

    @classmethod
    def from_state(cls, state: State) -> "Codebook":
        """The codebook whose `state` this is; shares its tensors."""
        metric = Metric(state["mean"], state.get("factor"), state.get("inverse"))
        return cls(state["codebook"], metric)

    @property
    def nbytes(self) -> int:
        return self.centroids.nbytes + self.metric.nbytes

    def state(self) -> State:
        """All of it as tensors: views, not copies."""
        named = {"codebook": self.centroids, **self.metric._asdict()}
        return {name: x for name, x in named.items() if x is not None}

    def encode(self, keys: Float[Tensor, "Hk N D"]) -> Codes:
        """The codes of keys; memory beyond them is bounded."""
        heads, subspaces = self.centroids.shape[:2]
        codes = keys.new_empty((heads, keys.shape[1], subspaces), dtype=torch.int64)
        errors = keys.new_empty((heads, keys.shape[1]), dtype=torch.float32)
        for head, start in _cuts(heads, keys.shape[1]):
            run = slice(start, start + RUN_TOKENS)
            z = self.metric.head(head).keys(keys[head : head + 1, run])[0]
            split = z.unflatten(-1, (subspaces, -1)).transpose(0, 1)
            found, distances = nearest(split, self.centroids[head])
            codes[head, run], errors[head, run] = found.mT, distances.sum(0)
        return Codes(codes, errors)

    def table(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hk G M C"]:
        """What each centroid adds to a score, q · mean spread evenly over sub-spaces."""
        subspaces = self.centroids.shape[1]
        split = self.metric.query(query).unflatten(-1, (subspaces, -1))  # [Hk, G, M, S]
        parts = torch.einsum("hgms,hmcs->hgmc", split, self.centroids)
        return parts + (self.metric.constant(query) / subspaces)[..., None, None]


def _cuts(heads: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Every head and the start of every run of tokens."""
    return ((head, start) for head in range(heads) for start in range(0, tokens, RUN_TOKENS))


def nearest(
    points: Float[Tensor, "M N S"], centroids: Float[Tensor, "M C S"]
) -> tuple[Int[Tensor, "M N"], Float[Tensor, "M N"]]:
    """The nearest centroid of every point, and its squared distance."""
    half = centroids.square().sum(-1)[:, None] / 2
    run = max(64, RUN_ELEMENTS // half.numel())
    found = [
        torch.baddbmm(half, part, centroids.mT, alpha=-1).min(-1) for part in points.split(run, 1)
    ]
    least = torch.cat([x.values for x in found], 1)
    distances = (points.square().sum(-1) + 2 * least).clamp_min(0)
    return torch.cat([x.indices for x in found], 1), distances


def looked_up(
    table: Float[Tensor, "Hk G C"], codes: Shaped[Tensor, "Hk T"]
) -> Float[Tensor, "Hq T"]:
    """The entry of every token's code, for each query head.

    131,072 tokens of one KV head with 4 query heads: 0.2 ms on one AVX-512 core.
    """
    found = [own.index_select(1, ids.int()) for own, ids in zip(table, codes, strict=True)]
    return torch.cat(found)


def train_codebook(
    keys: Float[Tensor, "Hk N D"],
    metric: Metric,
    *,
    subspaces: int = 1,
    centroids: int = 256,
    training: Training | None = None,
) -> Codebook:
    """A codebook of these keys, on their device.

    FAISS trains it there too, if that is a GPU and FAISS is built for one; else on the CPU, where
    the same keys give the same codebook whatever the threads. Where a head has no more distinct
    keys than `centroids`, they are its centroids: its scores are exact then.

    Raises:
        ImportError: if FAISS is needed and missing; names the extra that brings it.
        ValueError: if there is no key, or k-means meets some whose squares overflow.
    """
    training = training or Training()
    if not keys.shape[1]:
        raise ValueError("a codebook needs at least one key: append keys before finalize")
    points = []
    for head, own in enumerate(keys):
        z = metric.head(head).keys(_drawn(own, centroids, training)[None])[0]
        points += list(z.unflatten(-1, (subspaces, -1)).unbind(1))
    books = _padded(_trained(points, centroids, training))
    return Codebook(books.to(keys.device).unflatten(0, (len(keys), subspaces)), metric)


def _drawn(keys: Float[Tensor, "N D"], centroids: int, training: Training) -> Float[Tensor, "n D"]:
    """All distinct keys, if they are few enough to be centroids themselves, else a sample."""
    few = _distinct(keys, centroids)
    if few is not None:
        return few
    generator = torch.Generator().manual_seed(training.seed)
    chosen = torch.randperm(len(keys), generator=generator)[: centroids * training.points]
    return keys[chosen.sort().values.to(keys.device)]


def _distinct(rows: Float[Tensor, "N S"], most: int) -> Float[Tensor, "n S"] | None:
    """The distinct rows, unless they are more than `most`, which a few of them tell as a rule."""
    if len(rows[: 2 * most].unique(dim=0)) > most:
        return None
    found = rows.unique(dim=0)
    return found if len(found) <= most else None


def _trained(
    points: Sequence[Float[Tensor, "_ S"]], centroids: int, training: Training
) -> list[Float[Tensor, "_ S"]]:
    """A codebook for each set of points, on one thread each: more would change the sums.

    On a GPU one after the other: each fills it.
    """
    few = [_distinct(x, centroids) for x in points]
    if all(x is not None for x in few):
        return [x for x in few if x is not None]
    faiss, device = faiss_module(), points[0].device
    threads = 1 if _on_gpu(faiss, device) else torch.get_num_threads()

    def train(index: int) -> Tensor:
        own = few[index]
        return _kmeans(faiss, points[index], centroids, training) if own is None else own

    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return [x.to(device) for x in pool.map(train, range(len(points)))]


def _kmeans(
    faiss: ModuleType, points: Float[Tensor, "n S"], centroids: int, training: Training
) -> Float[Tensor, "c S"]:
    """Lloyd's algorithm; `points` holds more distinct rows than `centroids`."""
    size = points.shape[1]
    if not bool((2 * points).square().sum(-1).isfinite().all()):  # FAISS would end the process
        raise ValueError("k-means needs keys whose distances are finite in float32")
    run = faiss.Clustering(size, centroids)
    run.niter, run.seed = training.iterations, training.seed
    run.min_points_per_centroid = 1  # few points are no reason for a warning
    run.max_points_per_centroid = len(points)  # they are a sample already
    run.train(points.cpu().contiguous().numpy(), _nearest_by(faiss, size, points.device))
    return torch.from_numpy(faiss.vector_to_array(run.centroids).reshape(centroids, size))


def _nearest_by(faiss: ModuleType, size: int, device: torch.device) -> Any:
    """What of FAISS finds the nearest centroids, on the points' GPU where it can."""
    if not _on_gpu(faiss, device):
        return faiss.IndexFlatL2(size)
    resources, config = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
    resources.setTempMemory(GPU_BYTES)
    config.device = device.index or 0
    return faiss.GpuIndexFlatL2(resources, size, config)


def _on_gpu(faiss: ModuleType, device: torch.device) -> bool:
    return device.type == "cuda" and faiss.get_num_gpus() > 0


def _padded(books: Sequence[Float[Tensor, "_ S"]]) -> Float[Tensor, "n C S"]:
    """Books of unlike size as one tensor: the last centroid is repeated."""
    most = max(map(len, books))
    return torch.stack([torch.cat([x, x[-1:].expand(most - len(x), -1)]) for x in books])


def faiss_module() -> ModuleType:
    """FAISS, imported when it is first needed, to compare many keys at once by BLAS.

    Raises:
        ImportError: if it is not installed; names the extra.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "training a codebook needs FAISS: pip install headrace[cpu] (or headrace[gpu])"
        ) from error
    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM
    return faiss
