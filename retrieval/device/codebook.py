"""Codebooks of a batch: one for each slot, in tensors that stay where they are."""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from retrieval.codebook import Codebook


class DeviceBooks:
    """The codebooks of all slots, each with its own metric and number of centroids.

        centroids [B, Hk, M, C, S]   half [B, Hk, M, C]   |centroid|² / 2, infinite where none is
        mean [B, Hk, D]   factor, inverse [B, Hk, D, D]   of the metric; identities if it is plain

    Args:
        slots: B.
        centroids: C of each sub-space at most.
    Raises:
        ValueError: if sub-spaces do not divide the dimensions.
    """

    def __init__(
        self,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        subspaces: int,
        centroids: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if subspaces < 1 or head_dim % subspaces:
            raise ValueError(f"subspaces must divide the {head_dim} dimensions, got {subspaces}")
        heads, size = (slots, num_kv_heads), head_dim // subspaces
        self.centroids = torch.zeros((*heads, subspaces, centroids, size), device=device)
        self.half = torch.full((*heads, subspaces, centroids), torch.inf, device=device)
        self.mean = torch.zeros((*heads, head_dim), device=device)
        self._plain = torch.eye(head_dim, device=device)
        self.factor = self._plain.repeat(*heads, 1, 1)
        self.inverse = self.factor.clone()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        held = (self.centroids, self.half, self.mean, self._plain, self.factor, self.inverse)
        return sum(x.nbytes for x in held)

    def adopt(self, slot: int, book: Codebook) -> None:
        """Copy the codebook of one request into a slot.

        Raises:
            ValueError: if it is of another shape or has too many centroids.
        """
        heads, subspaces, most, size = self.centroids.shape[1:]
        got = tuple(book.centroids.shape)
        count = got[2]
        if got != (heads, subspaces, count, size) or count > most:
            raise ValueError(
                f"need a codebook of {heads} KV heads, {subspaces} sub-spaces of {size} and at "
                f"most {most} centroids, got {list(got)}"
            )
        self.centroids[slot, :, :, :count] = book.centroids
        self.centroids[slot, :, :, count:] = book.centroids[:, :, -1:]  # widens no table's range
        self.half[slot] = torch.inf
        self.half[slot, :, :, :count] = book.centroids.square().sum(-1) / 2
        mean, factor, inverse = book.metric
        self.mean[slot] = mean
        self.factor[slot] = self._plain if factor is None else factor
        self.inverse[slot] = self._plain if inverse is None else inverse

    def encode(self, keys: Float[Tensor, "B Hk D"]) -> Int64[Tensor, "B Hk M"]:
        """The nearest centroid of each sub-space of one key of each slot."""
        centred = (keys.float() - self.mean)[:, :, None]
        z = (centred @ self.factor).unflatten(-1, (self.centroids.shape[2], -1))
        z = z.transpose(2, 3)  # [B, Hk, M, 1, S]
        return (self.half - (z @ self.centroids.mT).squeeze(3)).argmin(-1)

    def table(self, query: Float32[Tensor, "B Hq D"]) -> Float32[Tensor, "B Hq M C"]:
        """What each centroid adds to a score, as `Codebook.table`."""
        heads, subspaces = self.centroids.shape[1:3]
        grouped = query.unflatten(1, (heads, -1))
        split = (grouped @ self.inverse.mT).unflatten(-1, (subspaces, -1)).transpose(2, 3)
        constant = grouped @ self.mean[..., None]  # [B, Hk, G, 1]
        parts = split @ self.centroids.mT  # [B, Hk, M, G, C]
        return (parts.transpose(2, 3) + constant[..., None] / subspaces).flatten(1, 2)
