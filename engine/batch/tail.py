"""The estimated tail of one layer of a batch, in static shapes; see `retrieval.estimate.Tail`."""

import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from engine.kernels.append_tail import append_tail
from engine.kernels.attend_whole import attend_whole
from engine.model.pieces import Shape
from kvstore.rows import RowLayout
from retrieval.estimate import CLUSTER_TOKENS, Tail

PITCH = 16  # numbers: a stride that Triton knows to be a multiple of 16 makes wide loads


class BatchTail:
    """Clusters of all tokens of all slots: mean key, mean value, variance of the keys.

    Args:
        softcap: of the layer's scores, see `Tail`.
    """

    def __init__(self, shape: Shape, slots: int, capacity: int, softcap: float | None) -> None:
        heads, clusters = shape.num_kv_heads, -(-capacity // CLUSTER_TOKENS)
        self._width, self._softcap = 2 * shape.head_dim + 1, softcap
        pitch = -(-self._width // PITCH) * PITCH
        self._rows = torch.zeros(slots, heads, clusters, pitch, device=shape.device)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    @property
    def summaries(self) -> Float32[Tensor, "B Hk C F"]:
        """A view: rows are padded."""
        return self._rows[..., : self._width]

    def adopt(self, slot: int, tail: Tail) -> None:
        """The clusters of one request."""
        rows = tail.summaries
        self.summaries[slot, :, : rows.shape[1]] = rows

    def append(
        self,
        k: Float[Tensor, "B Hk D"],
        v: Float[Tensor, "B Hk D"],
        positions: Int32[Tensor, " B"],
    ) -> None:
        """The newest token of every slot, rotated; nothing of a free one."""
        append_tail(k, v, positions, self.summaries, CLUSTER_TOKENS)

    def attend(
        self,
        q: Float[Tensor, "B Hq D"],
        lengths: Int32[Tensor, " B"],
        ids: Int32[Tensor, "B Hk K"],
        hot: UInt8[Tensor, "B Hk S row"],
        slots: Int32[Tensor, "B Hk K"],
        layout: RowLayout,
        scale: float,
    ) -> Float[Tensor, "B Hq D"]:
        """Attention over `ids`, whose rows are in `slots`; every other token is estimated."""
        return attend_whole(
            *(q, self.summaries, lengths, ids, hot, slots, layout),
            *(CLUSTER_TOKENS, scale, self._softcap),
        ).out
