"""The default index on a device: a few bits for every dimension of every key, for a batch."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from retrieval.axes import groups
from retrieval.device.coded import Coded
from retrieval.device.codes import DeviceCodes
from retrieval.index import KeySpace, KVIndex, State
from retrieval.kernels.encode import encode
from retrieval.kernels.score_codes import score_codes
from retrieval.kernels.scores import Scores
from retrieval.kernels.tables import Coordinates, tables
from retrieval.scalar import LEVELS, Bits, ScalarIndex, levels


class DeviceScalar(Coded):
    """`ScalarIndex` for the B slots of a batch, in static shapes; see `DeviceIndex`.

    Every request has its own mean and axes, and its own share of 4, 2 and 1 bits.

    Args:
        capacity: tokens of a slot.
        dtype: of the keys that `append` takes.
        bits: of a dimension, on average, as the requests' indexes have.
    Raises:
        ValueError: for a setting out of range.
    """

    kind = ScalarIndex

    def __init__(
        self,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        bits: Bits = 2,
        key_space: KeySpace = "rotated",
    ) -> None:
        if bits not in LEVELS or head_dim * bits % 4:
            raise ValueError(
                f"bits must be 1, 2 or 4, and head_dim a multiple of 4 / bits: got bits {bits} "
                f"and head_dim {head_dim}"
            )
        super().__init__(key_space, capacity)
        self._bits, self._dtype = bits, dtype
        subspaces = head_dim * bits // 4
        self._codes = DeviceCodes(
            slots, num_kv_heads, subspaces, capacity, scaled=True, device=device
        )
        self._axes = _unset(slots, num_kv_heads, head_dim, subspaces, device)

    @property
    def nbytes(self) -> int:
        """Of codes, scales, means and axes of all slots."""
        return self._codes.nbytes + sum(x.nbytes for x in self._axes)

    def adopt(self, slot: int, index: KVIndex) -> None:
        """Copy a finalized ScalarIndex into a slot.

        Raises:
            ValueError: if it is another index, not final, of another shape, or too long.
        """
        state = self._accepted(index)
        heads, dim = self._axes.mean.shape[1:]
        got = (len(state["mean"]), state["mean"].shape[2], int(state["settings"][0]))
        if got != (want := (heads, dim, self._bits)):
            raise ValueError(f"need (KV heads, head_dim, bits) {want}, got {got}")
        self._codes.check(state)
        self._codes.adopt(slot, state)
        _set(self._axes, slot, state)

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """Encode one key of each slot as token `positions[b]`; nothing where that is negative.

        Raises:
            ValueError: if keys are of another dtype.
        """
        if keys.dtype != self._dtype:
            raise ValueError(f"the index takes keys in {self._dtype}, got {keys.dtype}")
        assert self._codes.scales is not None
        encode(keys, positions, self._axes, self._codes.packed, self._codes.scales)

    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores:
        """q · (mean + code) of tokens [0, lengths[b])."""
        found = tables(query, self._axes)
        return score_codes(self._codes.packed, self._codes.scales, found, lengths, scale)


def _unset(
    slots: int, heads: int, dim: int, subspaces: int, device: torch.device | str
) -> Coordinates:
    """Coordinates of slots that are free: codes of no bits, which score 0."""
    ladders = torch.zeros(5, 16)
    edges = torch.full((5, 16), torch.inf)
    for bits in LEVELS:
        row = levels(bits)
        ladders[bits, : len(row)], edges[bits, : len(row) - 1] = row, (row[1:] + row[:-1]) / 2
    return Coordinates(
        basis=torch.zeros(slots, heads, dim, dim, device=device),
        spread=torch.ones(slots, heads, dim, device=device),
        mean=torch.zeros(slots, heads, dim, device=device),
        first=torch.zeros(slots, subspaces, dtype=torch.int32, device=device),
        bits=torch.zeros(slots, subspaces, dtype=torch.int32, device=device),
        levels=ladders.to(device),
        edges=edges.to(device),
    )


def _set(axes: Coordinates, slot: int, state: State) -> None:
    """Write what a request's keys are rounded in into its slot."""
    four, two, one = state["sizes"].tolist()
    spans = groups((four, two, one))
    first = [torch.arange(start, stop, 4 // bits) for start, stop, bits in spans]
    bits = [torch.full_like(x, span.bits) for x, span in zip(first, spans, strict=True)]
    used = four + two + one
    axes.basis[slot].zero_()[..., :used].copy_(state["basis"])
    axes.spread[slot].fill_(1)[..., :used].copy_(state["spread"])
    axes.mean[slot].copy_(state["mean"][:, 0])
    axes.first[slot].copy_(torch.cat(first))
    axes.bits[slot].copy_(torch.cat(bits))
