"""Which directions keys vary in, and how many bits each is worth.

A number of variance v that is rounded to the best 2^b levels keeps an error of `LOST[b]` v, so bits
go to where variance is: reverse water-filling (Cover and Thomas 2006, section 10.3), with 4, 2, 1
or no bits for a dimension, since those fill codes of 4 bits. Within dimensions of equal bits a
random rotation makes variances equal and values near Gaussian.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from retrieval.hadamard import rotation
from retrieval.index import State

LOST = {4: 0.009497, 2: 0.1175, 1: 0.3634, 0: 1.0}  # of a Gaussian's variance (Max 1960)
WIDTHS = (4, 2, 1)  # bits of a dimension, in the order of the groups
STEPS = 16  # sizes of the first group that are tried
LARGEST = 1e15  # keys longer than this say nothing about the others: their squares overflow


class Group(NamedTuple):
    """Neighbouring dimensions that have equally many bits."""

    start: int
    stop: int
    bits: int


class Axes(NamedTuple):
    """Coordinates that keys are rounded in.

    basis: orthonormal columns; those of no bits are left out. `(key - mean) @ basis / spread` has
        unit variance in every group.
    spread: standard deviation of a coordinate, the same within a group.
    sizes: dimensions of 4, 2 and 1 bits, in this order.
    """

    basis: Float[Tensor, "Hk D E"]
    spread: Float[Tensor, "Hk E"]
    sizes: tuple[int, int, int]

    @classmethod
    def fit(cls, keys: Float[Tensor, "Hk N D"], subspaces: int, seed: int = 0) -> "Axes":
        """Axes for keys like these, less their mean, with `subspaces` codes of 4 bits a key.

        Few keys say little about 128 directions: as many as there are dimensions, of the same
        variance in all of them, are added to those that are there.

        Args:
            seed: of the rotations within groups.
        """
        variances, vectors = _principal(keys)
        mean = variances.mean(-1, keepdim=True)
        sizes = allot((variances / mean.clamp_min(1e-30)).sum(0), subspaces)
        parts, spreads = [], []
        for start, stop, _ in groups(sizes):
            turn = rotation(stop - start, seed, keys.device)
            parts.append(vectors[..., start:stop] @ turn)
            level = variances[:, start:stop].mean(-1, keepdim=True).sqrt()
            spreads.append(level.where(level > 0, 1.0).expand(-1, stop - start))
        return cls(torch.cat(parts, -1), torch.cat(spreads, -1), sizes)

    @classmethod
    def from_state(cls, state: State) -> "Axes":
        """The axes whose `state` this is; shares its tensors."""
        four, two, one = state["sizes"].tolist()
        return cls(state["basis"], state["spread"], (four, two, one))

    def state(self) -> State:
        """All of it as tensors."""
        return {"basis": self.basis, "spread": self.spread, "sizes": torch.tensor(self.sizes)}

    @property
    def nbytes(self) -> int:
        return self.basis.nbytes + self.spread.nbytes


def groups(sizes: tuple[int, int, int]) -> list[Group]:
    """The groups that have dimensions."""
    ends = (0, sizes[0], sizes[0] + sizes[1], sum(sizes))
    spans = zip(pairwise(ends), WIDTHS, strict=True)
    return [Group(start, stop, bits) for (start, stop), bits in spans if start < stop]


def allot(variances: Float[Tensor, " D"], subspaces: int) -> tuple[int, int, int]:
    """How many dimensions get 4, 2 and 1 bits, so that the least of all variance is lost.

    Args:
        variances: descending.
        subspaces: codes of 4 bits to be filled, D / 4 or more and no more than D.
    """
    total = torch.cat([variances.new_zeros(1), variances.cumsum(0)]).double().tolist()
    return min(_fitting(len(variances), subspaces), key=lambda sizes: _lost(total, sizes))


def _fitting(dim: int, subspaces: int) -> list[tuple[int, int, int]]:
    """Sizes that fill the codes: one dimension of 4 bits each, two of 2, or four of 1."""
    found, most = [], min(dim, subspaces)
    for four in sorted({*range(0, most + 1, max(1, dim // STEPS)), most}):
        for two in range(0, 2 * (subspaces - four) + 1, 2):
            one = 4 * (subspaces - four - two // 2)
            if four + two + one <= dim:
                found.append((four, two, one))
    return found


def _lost(total: list[float], sizes: tuple[int, int, int]) -> float:
    """Variance that is lost; `total` [D + 1] has that of the first n dimensions at n."""
    kept = sum(
        (1 - LOST[bits]) * (total[stop] - total[start]) for start, stop, bits in groups(sizes)
    )
    return total[-1] - kept


def _principal(
    keys: Float[Tensor, "Hk N D"],
) -> tuple[Float[Tensor, "Hk D"], Float[Tensor, "Hk D D"]]:
    """Variances of keys, descending, and the directions that have them, as columns."""
    heads, count, dim = keys.shape
    gram = torch.zeros(heads, dim, dim, dtype=torch.float64, device=keys.device)
    for run in keys.split(1024, 1):
        rows = run.float()
        rows = rows.where(rows.norm(dim=-1, keepdim=True) < LARGEST, 0.0)
        gram += rows.mT @ rows
    even = gram.diagonal(dim1=1, dim2=2).mean(-1) / max(1, count)
    gram.diagonal(dim1=1, dim2=2).add_(dim * even[:, None])
    variances, vectors = torch.linalg.eigh(gram / (count + dim))
    return variances.flip(-1).clamp_min(0).float(), vectors.flip(-1).float()
