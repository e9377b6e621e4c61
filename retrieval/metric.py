"""Distances of keys that are errors of scores: the query-aware metric (A2ATS, He et al. 2025).

A key k coded as c changes the score of a query q by q·(k − c), on average over queries by

    E (q·(k − c))² = (k − c) H (k − c)ᵀ,   H = E qᵀq = L Lᵀ

which is the squared distance of kL and cL. So keys are coded as z = (k − mean) L, where any
k-means is query-aware, and a query meets them as q L⁻ᵀ:

    q · k = (q L⁻ᵀ) · z + q · mean

Taking off the mean changes no distance, and keeps large common offsets of keys out of fp32's way.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Metric(NamedTuple):
    """Where keys of each KV head are coded; without `factor`, plain distances of centred keys."""

    mean: Float[Tensor, "Hk D"]
    factor: Float[Tensor, "Hk D D"] | None  # L, lower triangular
    inverse: Float[Tensor, "Hk D D"] | None  # L⁻¹

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self if x is not None)

    def head(self, head: int) -> "Metric":
        """Of one KV head, which stays as a dimension of size 1."""
        mean, factor, inverse = (None if x is None else x[head : head + 1] for x in self)
        assert mean is not None
        return Metric(mean, factor, inverse)

    def keys(self, keys: Float[Tensor, "Hk N D"]) -> Float[Tensor, "Hk N D"]:
        """z of every key, in fp32."""
        centred = keys.float() - self.mean[:, None]
        return centred if self.factor is None else centred @ self.factor

    def query(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hk G D"]:
        """What to multiply z with, by group."""
        grouped = query.float().unflatten(0, (len(self.mean), -1))
        return grouped if self.inverse is None else grouped @ self.inverse.mT

    def constant(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hk G"]:
        """q · mean, the part of every score that z does not carry."""
        grouped = query.float().unflatten(0, (len(self.mean), -1))
        return (grouped @ self.mean[..., None]).squeeze(-1)

    def spread(self, keys: Float[Tensor, "Hk N D"]) -> Float[Tensor, " Hk"]:
        """Mean squared distance of keys to their own mean."""
        return torch.stack([_spread(self.head(i).keys(k[None])[0]) for i, k in enumerate(keys)])


def _spread(z: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    return (z - z.mean(0)).square().sum(-1).mean()


class Moment:
    """H, gathered over any number of calls: over queries and over the query heads of a KV head."""

    def __init__(
        self, num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        self.count = 0
        self._sum = torch.zeros(
            (num_kv_heads, head_dim, head_dim), dtype=torch.float64, device=device
        )

    @classmethod
    def of(cls, value: Float[Tensor, "Hk D D"], count: int) -> "Moment":
        """A moment that was gathered before, with the number of queries of each KV head."""
        made = cls(len(value), value.shape[-1], value.device)
        made.count, made._sum = count, value.double() * count
        return made

    @property
    def value(self) -> Float[Tensor, "Hk D D"]:
        """H in fp64; zero before the first query."""
        return self._sum / max(1, self.count)

    def add(self, queries: Float[Tensor, "Hq N D"]) -> None:
        """N more queries of every head."""
        heads = len(self._sum)
        flat = queries.double().reshape(heads, -1, queries.shape[-1])
        self._sum += flat.mT @ flat
        self.count += flat.shape[1]


def make_metric(
    mean: Float[Tensor, "Hk D"],
    moment: Float[Tensor, "Hk D D"] | None = None,
    *,
    ridge: float = 1e-3,
) -> Metric:
    """The metric of given queries, or plain distances without them, or in a head where all are
    zero; decomposed in fp64.

    H is scaled to a mean diagonal of 1, which changes no code: where all directions are alike, L
    is the identity.

    Args:
        ridge: added to that diagonal, so that directions no query took still count a little.
    Raises:
        ValueError: if queries are not finite.
    """
    if moment is None:
        return Metric(mean.float(), None, None)
    scale = moment.double().diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool(scale.isfinite().all()):
        raise ValueError("a metric needs finite queries")
    scale = scale.where(scale > 0, 1.0)
    eye = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    scaled = (moment.double() / scale[:, None, None] + ridge * eye) / (1 + ridge)
    factor = torch.linalg.cholesky(scaled)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return Metric(mean.float(), factor.float(), inverse.float())
