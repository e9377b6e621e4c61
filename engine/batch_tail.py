"""The estimated tail of one layer of a batch, in static shapes; see `retrieval.estimate.Tail`."""

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from engine.kernels.merge_parts import Partials
from engine.kernels.tail import estimate_tail
from engine.model import Shape
from kvstore.rows import RowLayout
from retrieval.estimate import CLUSTER_TOKENS, Tail

PITCH = 4  # numbers: rows begin at multiples of 16 bytes


class BatchTail:
    """Clusters of all tokens of all slots, and the tokens of each slot's last one, which grows.

    summaries [B, Hk, C, 2 D + 1]   mean key, mean value, variance of the keys
    open [B, Hk, cluster, 2 D]   keys and values of the cluster that is being filled
    """

    def __init__(self, shape: Shape, slots: int, capacity: int) -> None:
        heads, dim, where = shape.num_kv_heads, shape.head_dim, shape.device
        clusters, self._width = -(-capacity // CLUSTER_TOKENS), 2 * dim + 1
        pitch = -(-self._width // PITCH) * PITCH
        self._rows = torch.zeros(slots, heads, clusters, pitch, device=where)
        size = (slots, heads, CLUSTER_TOKENS, 2 * dim)
        self._open = torch.zeros(size, dtype=shape.dtype, device=where)
        self._within = torch.arange(CLUSTER_TOKENS, device=where)
        self._slots = torch.arange(slots, device=where)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._open.nbytes

    @property
    def summaries(self) -> Float32[Tensor, "B Hk C F"]:
        """A view: rows are padded."""
        return self._rows[..., : self._width]

    def adopt(self, slot: int, tail: Tail) -> None:
        """The clusters of one request."""
        rows, begun = tail.summaries, tail.open
        self.summaries[slot, :, : rows.shape[1]] = rows
        self._open[slot, :, : begun.shape[1]] = begun

    def append(
        self,
        k: Float[Tensor, "B Hk D"],
        v: Float[Tensor, "B Hk D"],
        positions: Int32[Tensor, " B"],
    ) -> None:
        """The newest token of every slot, rotated; a free slot's lands where nobody reads."""
        at = positions.clamp_min(0).long()
        self._open[self._slots, :, at % CLUSTER_TOKENS] = torch.cat([k, v], -1)
        there = (self._within <= at[:, None] % CLUSTER_TOKENS)[:, None, :, None]
        row = _summarised(self._open.float().where(there, 0.0), there)
        self.summaries[self._slots, :, at // CLUSTER_TOKENS] = row

    def estimate(
        self,
        q: Float[Tensor, "B Hq D"],
        lengths: Int32[Tensor, " B"],
        ids: Int32[Tensor, "B Hk K"],
        hot: UInt8[Tensor, "B Hk S row"],
        slots: Int32[Tensor, "B Hk K"],
        layout: RowLayout,
        scale: float,
    ) -> Partials:
        """Attention over every token but `ids`, whose rows are in `slots`, estimated."""
        rows = self.summaries
        return estimate_tail(q, rows, lengths, ids, hot, slots, layout, CLUSTER_TOKENS, scale)


def _summarised(rows: Float[Tensor, "B Hk N E"], there: Tensor) -> Float[Tensor, "B Hk F"]:
    """As Tail has it, of those of the N keys and values that are there; the others are 0."""
    count = there.sum(2)
    mean = rows.sum(2) / count
    off = (rows - mean[:, :, None]).chunk(2, -1)[0].where(there, 0.0)
    variance = off.square().sum((2, 3), keepdim=True)[..., 0] / (count * off.shape[-1])
    return torch.cat([mean, variance], -1)
