"""Product quantization with 4 bits on a device, for a batch: tables in torch, codes by a kernel."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from retrieval.codebook import Codebook
from retrieval.device_codes import DeviceCodes
from retrieval.index import KeySpace, KVIndex
from retrieval.kernels.encode import put
from retrieval.kernels.score_codes import score_codes
from retrieval.kernels.scores import Scores
from retrieval.kernels.tables import Tables, rounded
from retrieval.pq import PQIndex

CENTROIDS = 16


class DevicePQ4:
    """`PQIndex` of 4 bits for the B slots of a batch, in static shapes; see `DeviceIndex`.

    Every request has its own codebook and metric; one without a metric has the identity.

    Args:
        capacity: tokens of a slot.
        dtype: of the keys that `append` takes.
        subspaces: M; divides `head_dim`.
    Raises:
        ValueError: for a setting out of range.
    """

    unit_tokens = 1

    def __init__(
        self,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        subspaces: int = 16,
        key_space: KeySpace = "rotated",
    ) -> None:
        if subspaces < 1 or head_dim % subspaces:
            raise ValueError(f"subspaces must divide the {head_dim} dimensions, got {subspaces}")
        self.key_space: KeySpace = key_space
        self._dtype = dtype
        self._codes = DeviceCodes(
            slots, num_kv_heads, subspaces, capacity, scaled=False, device=device
        )
        shape = (slots, num_kv_heads)
        self._centroids = torch.zeros(
            *shape, subspaces, CENTROIDS, head_dim // subspaces, device=device
        )
        self._mean = torch.zeros(*shape, head_dim, device=device)
        self._factor = torch.eye(head_dim, device=device).repeat(*shape, 1, 1)
        self._inverse = self._factor.clone()

    @property
    def nbytes(self) -> int:
        """Of codes, codebooks and metrics of all slots."""
        book = (self._centroids, self._mean, self._factor, self._inverse)
        return self._codes.nbytes + sum(x.nbytes for x in book)

    @property
    def outliers(self) -> Int32[Tensor, "B Hk S"] | None:
        """None: every token has its own code."""
        return None

    def adopt(self, slot: int, index: KVIndex) -> None:
        """Copy a finalized PQIndex of 4 bits into a slot.

        Raises:
            ValueError: if it is another index, not final, of another shape, or too long.
        """
        if not isinstance(index, PQIndex):
            raise ValueError(f"need a PQIndex, got {type(index).__name__}")
        state = index.state()
        if "keys" in state or "packed" not in state:
            raise ValueError("need a PQIndex of 4 bits that is final: finalize comes before adopt")
        if index.spec.key_space != self.key_space:
            raise ValueError(f"need keys {self.key_space}, got {index.spec.key_space}")
        assert index.codebook is not None
        heads, dim = index.codebook.metric.mean.shape
        if (heads, dim) != (want := tuple(self._mean.shape[1:])):
            raise ValueError(f"need (KV heads, head_dim) {want}, got {(heads, dim)}")
        self._codes.check(state)
        self._codes.adopt(slot, state)
        self._set(slot, index.codebook)

    def clear(self, slot: int) -> None:
        """Nothing: codes behind a length are not read, and `adopt` replaces all else."""

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """Encode one key of each slot as token `positions[b]`; nothing where that is negative.

        Raises:
            ValueError: if keys are of another dtype.
        """
        if keys.dtype != self._dtype:
            raise ValueError(f"the index takes keys in {self._dtype}, got {keys.dtype}")
        centred = (keys.float() - self._mean)[:, :, None]
        z = (centred @ self._factor)[:, :, 0].unflatten(-1, (self._centroids.shape[2], -1))
        products = (self._centroids @ z[..., None])[..., 0]  # [B, Hk, M, 16]
        codes = (self._centroids.square().sum(-1) / 2 - products).argmin(-1)
        put(codes.to(torch.uint8), positions, self._codes.packed)

    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores:
        """q · coded key of tokens [0, lengths[b])."""
        return score_codes(self._codes.packed, None, self._tables(query), lengths, scale)

    def _tables(self, query: Float[Tensor, "B Hq D"]) -> Tables:
        """What each centroid adds to a score, q · mean spread evenly over sub-spaces."""
        heads, subspaces = self._centroids.shape[1:3]
        grouped = query.float().unflatten(1, (heads, -1))  # [B, Hk, G, D]
        split = (grouped @ self._inverse.mT).unflatten(-1, (subspaces, -1))
        parts = torch.einsum("bhgms,bhmcs->bhgmc", split, self._centroids)
        constant = (grouped @ self._mean[..., None])[..., None] / subspaces  # [B, Hk, G, 1, 1]
        return rounded((parts + constant).flatten(1, 2), heads)

    def _set(self, slot: int, book: Codebook) -> None:
        """Write a codebook into a slot; where there are fewer centroids, the last is repeated."""
        found = book.centroids.shape[2]
        self._centroids[slot, :, :, :found].copy_(book.centroids)
        self._centroids[slot, :, :, found:].copy_(book.centroids[:, :, -1:])
        self._mean[slot].copy_(book.metric.mean)
        eye = torch.eye(self._mean.shape[2])
        for own, theirs in (
            (self._factor, book.metric.factor),
            (self._inverse, book.metric.inverse),
        ):
            own[slot].copy_(eye if theirs is None else theirs)
