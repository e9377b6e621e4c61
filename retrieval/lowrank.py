"""Keys as R numbers per token, shared by all KV heads of a layer (ShadowKV, Sun et al. 2024).

The unrotated keys of a token, all heads side by side, are one row of J = Hk·D numbers. The best
R-dimensional space of such rows is spanned by the leading eigenvectors of their Gram matrix,
which a chunked prefill adds up as it goes: the factors of an SVD that never sees all keys.

    coords = (k − mean) · basis          [T, R]
    k ≈ coords · basisᵀ + mean           basis [Hk, R, D]

How much of the keys' energy the rank keeps does not say what it costs: much of it is the mean
key, and keys of 0.98 of the energy gave outputs of attention that were 0.2 to 0.5 off.
`choose_rank` looks at those outputs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrieval.index import State
from retrieval.pending import Rows

RUN_TOKENS = 4096  # keys multiplied at once in fp32; their sums are kept in fp64


class Gram:
    """Σ kᵀk and Σ k of the unrotated keys of one layer, in any cut.

    Sums are of keys less those that came first, on average: a large mean takes no digits.
    """

    def __init__(
        self, num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        joint = num_kv_heads * head_dim
        self.num_kv_heads, self.count = num_kv_heads, 0
        self._products = torch.zeros((joint, joint), dtype=torch.float64, device=device)
        self._sum = torch.zeros(joint, dtype=torch.float64, device=device)
        self._shift = torch.zeros(joint, device=device)

    def accumulate(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys."""
        for run in keys.split(RUN_TOKENS, 1) if keys.shape[1] else ():
            rows = _joint(run)
            if not self.count:
                self._shift = rows.mean(0)
            rows -= self._shift
            self._products += rows.mT @ rows
            self._sum += rows.sum(0)
            self.count += len(rows)

    def mean(self) -> Float[Tensor, "Hk D"]:
        """Of all keys.

        Raises:
            ValueError: if there is none.
        """
        if not self.count:
            raise ValueError("a Gram matrix needs at least one key: accumulate keys first")
        joint = self._shift + self._sum / self.count
        return joint.float().unflatten(0, (self.num_kv_heads, -1))

    def directions(self, *, centred: bool = True) -> "Directions":
        """Eigenvectors of the Gram matrix of keys, less their mean or as they are."""
        mean = self.mean().flatten().double()
        gap = mean - self._shift
        around_mean = self._products - self.count * gap.outer(gap)
        gram = around_mean if centred else around_mean + self.count * mean.outer(mean)
        energy, vectors = torch.linalg.eigh(gram)  # ascending
        return Directions(vectors.flip(1).float(), energy.flip(0).clamp_min(0).float())


class Directions(NamedTuple):
    """Orthonormal columns, that which holds the most energy first."""

    vectors: Float[Tensor, "J J"]
    energy: Float[Tensor, " J"]

    def rank(self, share: float) -> int:
        """How many hold this share of the energy; read the note above before relying on it."""
        if not 0 < share <= 1:
            raise ValueError(f"energy must be in (0, 1], got {share}")
        held = self.energy.double().cumsum(0)
        return min(len(held), 1 + int((held < share * held[-1] * (1 - 1e-9)).sum()))


class LowRankKeys:
    """Factors of all keys of a layer, and any of its rows again.

    Keys have no position in them, so that moving tokens costs nothing. Two passes over the keys
    make one: `Gram`, then `append`; later tokens are projected on the same basis.

    Args:
        dtype: of the coordinates, bf16 or fp32; everything else is fp32.
        fitted: the first tokens appended, that the basis was made of; see `drift`.
    """

    def __init__(
        self,
        basis: Float[Tensor, "Hk R D"],
        mean: Float[Tensor, "Hk D"],
        *,
        dtype: torch.dtype = torch.bfloat16,
        fitted: int = 0,
    ) -> None:
        self._basis, self._mean, self._fitted = basis, mean, fitted
        self._coords = Rows(1, (basis.shape[1],), dtype, basis.device)
        self._lost = torch.zeros((2, 2), device=basis.device)  # fitted, later: lost and all energy

    @classmethod
    def from_gram(
        cls,
        gram: Gram,
        *,
        rank: int | None = None,
        energy: float | None = None,
        centred: bool = True,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "LowRankKeys":
        """The best basis of the keys in `gram`, and no tokens yet.

        Args:
            rank: R; more than there are dimensions means all of them.
            energy: or the least R that holds this share.
            centred: take off the mean key, so that no direction is spent on it.
        Raises:
            ValueError: unless one of `rank` and `energy` is given, and in range.
        """
        if (rank is None) == (energy is None):
            raise ValueError(f"give rank or energy, got rank={rank}, energy={energy}")
        directions = gram.directions(centred=centred)
        if energy is not None:
            rank = directions.rank(energy)
        assert rank is not None
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        mean = gram.mean() if centred else torch.zeros_like(gram.mean())
        leading = directions.vectors[:, :rank].unflatten(0, (gram.num_kv_heads, -1)).mT
        basis = leading.clone(memory_format=torch.contiguous_format)  # a view would keep them all
        keys = cls(basis, mean, dtype=dtype, fitted=gram.count)
        keys._coords.reserve(gram.count)  # at once: what outgrown buffers leave, glibc keeps
        return keys

    @classmethod
    def from_state(cls, state: State) -> "LowRankKeys":
        """The keys whose `state` this is; shares its tensors."""
        coords, fitted = state["coords"], int(state["fitted"])
        keys = cls(state["basis"], state["mean"], dtype=coords.dtype, fitted=fitted)
        keys._coords, keys._lost = Rows.of(coords[None]), state["lost"].clone()
        return keys

    @property
    def length(self) -> int:
        """Tokens."""
        return self._coords.length

    @property
    def rank(self) -> int:
        return self._basis.shape[1]

    @property
    def nbytes(self) -> int:
        """Of coordinates, room to grow included, basis and mean."""
        return self._coords.nbytes + self._basis.nbytes + self._mean.nbytes + self._lost.nbytes

    @property
    def residual(self) -> float:
        """Norm of what the basis misses of the keys it was made of, relative to theirs.

        Norms are of keys less the mean, and below about 1e-3 rounding.
        """
        return self._relative(0)

    @property
    def drift(self) -> float:
        """The same of all keys appended later: how well generated tokens fit; 0 without any."""
        return self._relative(1)

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys, unrotated, projected on the basis."""
        rows = _joint(keys) - self._mean.flatten()
        coords = rows @ self._basis.transpose(1, 2).flatten(0, 1)
        known = max(0, self._fitted - self.length)
        energy, held = rows.square().sum(1), coords.square().sum(1)
        lost = torch.stack([(energy - held).clamp_min(0), energy])  # [2, N]
        self._lost += torch.stack([lost[:, :known].sum(1), lost[:, known:].sum(1)])
        self._coords.append(coords[None].to(self._coords.view.dtype))

    def rows(self, tokens: Int[Tensor, "Hk K"]) -> Float[Tensor, "Hk K D"]:
        """The keys of some tokens, each head its own, unrotated and in fp32."""
        coords = self._coords.view[0].index_select(0, tokens.flatten())
        coords = coords.float().unflatten(0, tuple(tokens.shape))
        return torch.baddbmm(self._mean[:, None], coords, self._basis)

    def state(self) -> State:
        """Coordinates, basis and what was lost: coordinates are a view, not a copy."""
        return {
            "coords": self._coords.view[0],
            "basis": self._basis,
            "mean": self._mean,
            "fitted": torch.tensor(self._fitted),
            "lost": self._lost.clone(),
        }

    def _relative(self, part: int) -> float:
        lost, energy = self._lost[part].tolist()
        return float((lost / energy) ** 0.5) if energy else 0.0


class RankChoice(NamedTuple):
    """The smallest rank whose error was tolerated, or the largest there was, and its error."""

    rank: int
    error: float


def choose_rank(
    gram: Gram,
    keys: Float[Tensor, "Hk N D"],
    values: Float[Tensor, "Hk N D"],
    queries: Float[Tensor, "Hq Q D"],
    *,
    ranks: Sequence[int],
    tolerance: float,
    scale: float,
    rotate: Callable[[Tensor], Tensor] | None = None,
    centred: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> RankChoice:
    """A rank by what it does to the output of attention, of sample queries over sample keys.

    The error is ‖o − ô‖ / ‖o‖ over all queries and heads, ô with keys from their factors. Ranks
    are tried in ascending order.

    Args:
        keys: unrotated; every query sees them all.
        queries: as attention takes them.
        rotate: turns all keys to their positions, if attention takes them rotated.
        scale: factor on scores before their softmax.
    """
    if not ranks:
        raise ValueError("choose_rank needs at least one rank to try")
    turn = rotate or (lambda x: x)
    want = _attended(queries, turn(keys.float()), values, scale)
    found = RankChoice(0, float("inf"))
    for rank in sorted(ranks):
        factors = LowRankKeys.from_gram(gram, rank=rank, centred=centred, dtype=dtype)
        factors.append(keys)
        tokens = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
        off = _attended(queries, turn(factors.rows(tokens)), values, scale) - want
        found = RankChoice(factors.rank, float(off.norm() / want.norm().clamp_min(1e-30)))
        if found.error <= tolerance:
            break
    return found


def _joint(keys: Float[Tensor, "Hk N D"]) -> Float[Tensor, "N J"]:
    """A copy in fp32, the heads of a token side by side."""
    return keys.transpose(0, 1).flatten(1).to(torch.float32, copy=True)


def _attended(
    queries: Float[Tensor, "Hq Q D"],
    keys: Float[Tensor, "Hk N D"],
    values: Float[Tensor, "Hk N D"],
    scale: float,
) -> Float[Tensor, "Hq Q D"]:
    group = len(queries) // len(keys)
    keys, values = (x.float().repeat_interleave(group, 0) for x in (keys, values))
    return (queries.float() @ keys.mT * scale).softmax(-1) @ values
