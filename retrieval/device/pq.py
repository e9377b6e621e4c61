"""Product quantization for a batch: a slot has a codebook and a metric of its own."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from retrieval.codebook import Codebook
from retrieval.device.codebook import DeviceBooks
from retrieval.device.coded import Coded
from retrieval.device.codes import DeviceCodes, put_codes
from retrieval.index import KeySpace, KVIndex
from retrieval.kernels.encode import put
from retrieval.kernels.score_codes import score_codes
from retrieval.kernels.score_lookup import score_lookup
from retrieval.kernels.scores import Scores
from retrieval.kernels.tables import rounded
from retrieval.pq import PQIndex

CENTROIDS = 16  # of 4 bits


class DevicePQ4(Coded):
    """`PQIndex` of 4 bits for the B slots of a batch, in static shapes; see `DeviceIndex`.

    Every request has its own codebook and metric; one without a metric has the identity.

    Args:
        capacity: tokens of a slot.
        dtype: of the keys that `append` takes.
        subspaces: M; divides `head_dim`.
    Raises:
        ValueError: for a setting out of range.
    """

    kind = PQIndex

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
        super().__init__(key_space, capacity)
        self._dtype = dtype
        self._codes = DeviceCodes(
            slots, num_kv_heads, subspaces, capacity, scaled=False, device=device
        )
        self._books = DeviceBooks(slots, num_kv_heads, head_dim, subspaces, CENTROIDS, device)

    @property
    def nbytes(self) -> int:
        """Of codes, codebooks and metrics of all slots."""
        return self._codes.nbytes + self._books.nbytes

    def adopt(self, slot: int, index: KVIndex) -> None:
        """Copy a finalized PQIndex of 4 bits into a slot.

        Raises:
            ValueError: if it is another index, not final, of another shape, or too long.
        """
        state = self._accepted(index)
        if "packed" not in state:
            raise ValueError(f"need codes of 4 bits, got {int(state['settings'][1])}")
        self._codes.check(state)
        self._books.adopt(slot, Codebook.from_state(state))
        self._codes.adopt(slot, state)

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


class DevicePQ8(Coded):
    """A `DeviceIndex` of `PQIndex` with 8 bits.

        codes [B, Hk, T, M]

    Args:
        slots: B.
        capacity: of a slot, in tokens.
        subspaces: M.
    Raises:
        ValueError: if sub-spaces do not divide the dimensions.
    """

    kind = PQIndex

    def __init__(
        self,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        key_space: KeySpace = "rotated",
        subspaces: int = 16,
    ) -> None:
        super().__init__(key_space, capacity)
        self._books = DeviceBooks(slots, num_kv_heads, head_dim, subspaces, 256, device)
        shape = (slots, num_kv_heads, capacity, subspaces)
        self._codes = torch.zeros(shape, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Of all tensors, whether slots are free or not."""
        return self._books.nbytes + self._codes.nbytes

    def adopt(self, slot: int, index: KVIndex) -> None:
        """Copy the finalized index of one request into a slot.

        Raises:
            ValueError: if it is of another kind or shape, not final, or too large.
        """
        state = self._accepted(index)
        if (bits := int(state["settings"][1])) != 8:
            raise ValueError(f"need codes of 8 bits, got {bits}")
        self._books.adopt(slot, Codebook.from_state(state))
        self._codes[slot, :, : index.length] = state["codes"]

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """A key of each slot, of the token number `positions[b]`; nothing where it is negative."""
        put_codes(self._codes, self._books.encode(keys).to(torch.uint8), positions)

    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores:
        """What `score` of each request's own index says."""
        return score_lookup(self._codes, self._books.table(query.float()), lengths, scale)
