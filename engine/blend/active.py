"""The tokens of a prompt that a loop computes, when the others' KV is there already."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from engine.blend.reuse import FRESH, Reuse
from engine.blend.runs import Runs
from engine.cache import Cache
from engine.model.pieces import QKV, Layer, Model
from engine.model.rope import Tables
from kvstore.block import LayerKV


class Active:
    """Tokens at ascending positions, and what all layers need of them, made once.

    Args:
        positions: those that have no KV among them.
    """

    def __init__(self, model: Model, reuse: Reuse, positions: Int[Tensor, " n"]) -> None:
        self.positions = positions
        self._model, self._reuse = model, reuse
        self.repaired = int((reuse.owner[positions] != FRESH).sum())  # how many have stored KV, too
        self._runs = Runs(positions, model.shape.dtype)
        self._tables = Tables(positions)

    def rows(self, blocks: Bool[Tensor, " b"]) -> Int[Tensor, " m"]:
        """Which of the tokens are in `blocks`, or have no KV."""
        return torch.isin(self.positions, self._reuse.active(blocks)).nonzero()[:, 0]

    def take(self, rows: Int[Tensor, " m"]) -> "Active":
        return Active(self._model, self._reuse, self.positions[rows])

    def rotate(self, layer: Layer, x: Float[Tensor, "H n D"]) -> Float[Tensor, "H n D"]:
        """Queries or keys of these tokens, rotated to their places."""
        return layer.rope.rotate(x, self._tables[layer.rope])

    def attend(
        self, layer: Layer, q: Float[Tensor, "Hq n D"], kv: LayerKV
    ) -> Float[Tensor, "Hq n D"]:
        """Attention of rotated queries, each over all of its own past."""
        return self._runs.attend(q, kv.k, kv.v, layer.attention)

    def deviation(self, fresh: Float[Tensor, "Hk n D"], kv: LayerKV) -> Float[Tensor, " b"]:
        """Per block, the mean squared distance of its tokens' values from the stored ones."""
        apart = (fresh - kv.v[:, self.positions]).float().square().sum((0, 2))
        whole = apart.new_zeros(len(self._reuse.owner)).index_copy_(0, self.positions, apart)
        return self._reuse.sum(whole) / self._reuse.sizes

    def write(
        self, layer: Layer, cache: Cache, kv: LayerKV, fresh: QKV, rotated: Float[Tensor, "Hk n D"]
    ) -> None:
        """Put the fresh KV of a layer, if it makes any, in the place of what is stored."""
        if not layer.owns:
            return
        kv.k.index_copy_(1, self.positions, rotated)
        kv.v.index_copy_(1, self.positions, fresh.v)
        if cache.recorder is not None:
            for at, rows in self._contiguous():
                cache.recorder.write(layer.owner, at, fresh.k[:, rows], fresh.v[:, rows])

    def _contiguous(self) -> Iterator[tuple[int, slice]]:
        """Where each run of neighbours starts, and which rows it is."""
        cuts = (self.positions.diff() > 1).nonzero()[:, 0] + 1
        edges = [0, *cuts.tolist(), len(self.positions)]
        for lo, hi in pairwise(edges):
            yield int(self.positions[lo]), slice(lo, hi)
