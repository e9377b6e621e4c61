"""Product quantization with 4 bits on a device, for a batch: tables in torch, codes by a kernel."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from retrieval.device.codebook import DeviceBooks
from retrieval.device.codes import DeviceCodes
from retrieval.index import KeySpace, KVIndex
from retrieval.kernels.encode import put
from retrieval.kernels.score_codes import score_codes
from retrieval.kernels.scores import Scores
from retrieval.kernels.tables import rounded
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
        self.key_space: KeySpace = key_space
        self._dtype = dtype
        self._codes = DeviceCodes(
            slots, num_kv_heads, subspaces, capacity, scaled=False, device=device
        )
        self._books = DeviceBooks(slots, num_kv_heads, head_dim, subspaces, CENTROIDS, device)

    @property
    def nbytes(self) -> int:
        """Of codes, codebooks and metrics of all slots."""
        return self._codes.nbytes + self._books.nbytes

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
        if (heads, dim) != (want := tuple(self._books.mean.shape[1:])):
            raise ValueError(f"need (KV heads, head_dim) {want}, got {(heads, dim)}")
        self._codes.check(state)
        self._codes.adopt(slot, state)
        self._books.adopt(slot, index.codebook)

    def clear(self, slot: int) -> None:
        """Nothing: codes behind a length are not read, and `adopt` replaces all else."""

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """Encode one key of each slot as token `positions[b]`; nothing where that is negative.

        Raises:
            ValueError: if keys are of another dtype.
        """
        if keys.dtype != self._dtype:
            raise ValueError(f"the index takes keys in {self._dtype}, got {keys.dtype}")
        codes = self._books.encode(keys)
        put(codes.to(torch.uint8), positions, self._codes.packed)

    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores:
        """q · coded key of tokens [0, lengths[b])."""
        tables = rounded(self._books.table(query.float()), self._books.mean.shape[1])
        return score_codes(self._codes.packed, None, tables, lengths, scale)
