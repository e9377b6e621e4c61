"""Indexes with a row for each unit, for a batch: landmarks, page bounds, the keys themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from retrieval.exact import Exact
from retrieval.index import KeySpace, KVIndex
from retrieval.kernels.append_unit import Form, append_unit, summarised
from retrieval.kernels.score_rows import score_rows
from retrieval.kernels.scores import Scores
from retrieval.landmarks import Landmarks
from retrieval.quest import Quest


@dataclass(frozen=True, slots=True)
class Kind:
    """What makes a row of the keys of a unit, and what a query meets it as.

    Args:
        index: of one request, whose scores are to be equalled.
        rows: the name of its rows of full units in its state; it holds keys that wait under
            "keys" alone, unless these are its rows.
        width: of a row over that of a key.
    """

    index: type[Landmarks] | type[Quest] | type[Exact]
    rows: str
    width: int
    form: Form
    query: Callable[[Float32[Tensor, "B Hq D"]], Float32[Tensor, "B Hq E"]]


def _same(query: Float32[Tensor, "B Hq D"]) -> Float32[Tensor, "B Hq D"]:
    return query


def _signs(query: Float32[Tensor, "B Hq D"]) -> Float32[Tensor, "B Hq E"]:
    """What maxima and what minima are multiplied with."""
    return torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)


LANDMARKS = Kind(Landmarks, "summaries", 1, "mean", _same)
BOUNDS = Kind(Quest, "summaries", 2, "bounds", _signs)
KEYS = Kind(Exact, "keys", 1, "key", _same)


class DeviceRows:
    """A `DeviceIndex` of the kinds above.

        rows [B, Hk, U, E]   the last one of a slot of a unit that is perhaps not full
        open [B, Hk, unit, D]   the keys of that unit, from which each append makes its row anew

    Outlier chunks of landmarks score -inf and have no share in the softmax of the others.

    Args:
        slots: B.
        capacity: of a slot, in tokens.
        dtype: of keys and rows.
        unit: tokens that share a row: `chunk` of landmarks, `page` of bounds, 1 of keys.
        outlier_units: of each KV head at most.
    Raises:
        ValueError: for a setting out of range.
    """

    key_space: KeySpace = "rotated"

    def __init__(
        self,
        kind: Kind,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        unit: int = 1,
        outlier_units: int = 0,
    ) -> None:
        if unit < 1 or outlier_units < 0:
            raise ValueError(f"need unit >= 1 and outlier_units >= 0, got {unit}, {outlier_units}")
        if (kind is KEYS and unit != 1) or (kind is not LANDMARKS and outlier_units):
            raise ValueError(
                f"{kind.index.__name__} has a unit of its own and landmarks alone have outliers, "
                f"got unit {unit} and {outlier_units} outliers"
            )
        self.unit_tokens, self.capacity, self._kind = unit, capacity, kind
        units = -(-capacity // unit)
        heads = (slots, num_kv_heads)
        self._rows = torch.zeros((*heads, units, kind.width * head_dim), dtype=dtype, device=device)
        self._open = torch.zeros((*heads, unit, head_dim), dtype=dtype, device=device)
        self._outliers = torch.full(
            (*heads, outlier_units * unit), -1, dtype=torch.int32, device=device
        )
        self._skipped = torch.zeros(
            (*heads, units if kind is LANDMARKS else 0), dtype=torch.bool, device=device
        )

    @property
    def nbytes(self) -> int:
        """Of all tensors, whether slots are free or not."""
        held = (self._rows, self._open, self._outliers, self._skipped)
        return sum(x.nbytes for x in held)

    @property
    def outliers(self) -> Int32[Tensor, "B Hk S"] | None:
        """Tokens of the chunks whose mean misleads, ascending, -1 behind them; of landmarks."""
        return self._outliers if self._kind is LANDMARKS else None

    def adopt(self, slot: int, index: KVIndex) -> None:
        """Copy the finalized index of one request into a slot.

        Raises:
            ValueError: if it is of another kind, shape or dtype, not final, or too large.
        """
        state = self._accepted(index)
        full, left = state[self._kind.rows], state.get("open")
        self.clear(slot)
        self._rows[slot, :, : full.shape[1]] = full
        if left is not None and left.shape[1]:
            self._open[slot, :, : left.shape[1]] = left
            count = torch.full((1,), left.shape[1], device=self._open.device)
            row = summarised(self._open[slot : slot + 1], count, self._kind.form)[0]
            self._rows[slot, :, full.shape[1]] = row
        if self._kind is LANDMARKS:
            self._skipped[slot].scatter_(1, state["chosen"].to(self._skipped.device), True)
            self._outliers[slot, :, : index.outliers.shape[1]] = index.outliers.int()

    def clear(self, slot: int) -> None:
        """The slot is free; its rows stay until others come."""
        self._outliers[slot] = -1
        self._skipped[slot] = False

    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None:
        """A key of each slot, of the token number `positions[b]`; nothing where it is negative.

        The tokens before it must be there.
        """
        append_unit(keys, positions, self._open, self._rows, self._kind.form)

    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores:
        """What `score` of each request's own index says."""
        units = (lengths + (self.unit_tokens - 1)) // self.unit_tokens
        skipped = self._skipped if self._kind is LANDMARKS else None
        return score_rows(
            self._rows, self._kind.query(query.float()), units, scale, skipped=skipped
        )

    def _accepted(self, index: KVIndex) -> dict[str, Tensor]:
        kind, state = self._kind, dict(index.state())
        if not isinstance(index, kind.index) or kind.rows not in state:
            raise ValueError(
                f"need a {kind.index.__name__} after finalize, got a {type(index).__name__}"
                + (" before it" if isinstance(index, kind.index) else "")
            )
        heads, width = self._rows.shape[1], self._rows.shape[3]
        rows = state[kind.rows]
        got = (len(rows), rows.shape[2], rows.dtype, index.spec.unit_tokens)
        if got != (want := (heads, width, self._rows.dtype, self.unit_tokens)):
            raise ValueError(f"need KV heads, row width, dtype and unit {want}, got {got}")
        most = self._outliers.shape[2]
        if index.length > self.capacity or index.outliers.shape[1] > most:
            raise ValueError(
                f"{index.length} tokens and {index.outliers.shape[1]} outliers do not fit slots "
                f"of {self.capacity} tokens and {most} outliers: raise capacity or outlier_units"
            )
        return state
