"""Low-rank keys of one layer of a batch, in static shapes; see `retrieval.lowrank`."""

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from engine.kernels.rebuild import Angles, Factors, rebuild
from engine.model.pieces import Shape
from engine.model.rope import FarTable, Rope
from kvstore.kernels.resolve import Resolved
from kvstore.rows import RowLayout
from retrieval.lowrank import LowRankKeys


class BatchFactors:
    """Coordinates of all tokens of all slots, and each slot's basis."""

    def __init__(self, shape: Shape, rope: Rope, rank: int, slots: int, capacity: int) -> None:
        heads, dim, where = shape.num_kv_heads, shape.head_dim, shape.device
        rank = min(rank, heads * dim)
        self._factors = Factors(
            torch.zeros(slots, capacity, rank, dtype=shape.dtype, device=where),
            torch.zeros(slots, heads, rank, dim, device=where),
            torch.zeros(slots, heads, dim, device=where),
        )
        self._far = FarTable(rope, capacity)
        self._angles = Angles(self._far.near, self._far.far, rope.interleaved)
        self._slots = torch.arange(slots, device=where)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._factors) + self._far.nbytes

    def adopt(self, slot: int, keys: LowRankKeys) -> None:
        """The factors of one request."""
        state = keys.state()
        self._factors.coefficients[slot, : keys.length] = state["coords"]
        self._factors.basis[slot], self._factors.mean[slot] = state["basis"], state["mean"]

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """The unrotated keys of the newest tokens; a free slot's land where nobody reads."""
        coords, basis, mean = self._factors
        rows = (keys.float() - mean).flatten(1)  # all heads of a token side by side
        found = torch.bmm(basis.transpose(1, 2).flatten(2), rows[..., None])[..., 0]
        coords[self._slots, positions.clamp_min(0).long()] = found.to(coords.dtype)

    def rebuild(self, found: Resolved, hot: UInt8[Tensor, "B Hk S row"], layout: RowLayout) -> None:
        """The keys of what was missing, rotated to their positions, into their slots."""
        rebuild(self._factors, found.missing, found.target, self._angles, hot, layout)
