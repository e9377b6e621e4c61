"""Rows of tokens in a buffer that grows, and exact scores of keys that wait for `finalize`."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

LEAST_ROWS = 16
GROWTH = 32  # a full buffer grows by this part of itself: memory is dearer than copies
CAST_ELEMENTS = 1 << 18  # keys widened to fp32 at once: 1 MiB, which stays in a core's cache


class Rows:
    """A row per token (or unit) and KV head, in one buffer that grows by a thirty-second.

    Keys that wait for `finalize`, codes, means: whatever an index holds per token.

        [0, length) written   [length, capacity) free

    Views given away stay valid and unchanged as long as `rewind` does not go behind their end.

    Args:
        shape: of one row: (D,) for keys, (M,) for codes, () for one number.
        least: rows that a full buffer grows by at least.
    """

    def __init__(
        self,
        num_kv_heads: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        least: int = LEAST_ROWS,
    ) -> None:
        self.length = 0
        self._least = least
        self._shared = 0  # rows that are not ours to overwrite
        self._buffer = torch.empty((num_kv_heads, 0, *shape), dtype=dtype, device=device)

    @classmethod
    def of(cls, rows: Shaped[Tensor, "Hk N ..."]) -> "Rows":
        """Rows that are there already; their memory is read until the next append, not written."""
        made = cls(len(rows), tuple(rows.shape[2:]), rows.dtype, rows.device)
        made.length = made._shared = rows.shape[1]
        made._buffer = rows
        return made

    @property
    def view(self) -> Shaped[Tensor, "Hk length ..."]:
        """All rows, no copy."""
        return self._buffer[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Of the buffer, room to grow included."""
        return self._buffer.nbytes

    def append(self, rows: Shaped[Tensor, "Hk N ..."]) -> None:
        """Write N rows after `length`.

        Raises:
            ValueError: if they are of another shape or dtype: nothing is converted silently.
        """
        old, (heads, count) = self._buffer, rows.shape[:2]
        if (heads, rows.shape[2:], rows.dtype) != (len(old), old.shape[2:], old.dtype):
            raise ValueError(
                f"the index takes [{len(old)}, N, {_list(old)}] in {old.dtype}, "
                f"got [{heads}, {count}, {_list(rows)}] in {rows.dtype}"
            )
        self._make_room(self.length + count)
        self._buffer[:, self.length : self.length + count] = rows
        self.length += count

    def rewind(self, length: int) -> None:
        """Forget rows from `length` on."""
        self.length = min(self.length, length)

    def reserve(self, length: int) -> None:
        """Have room for so many rows in all, and no more."""
        if length > self._buffer.shape[1]:
            self._move(length)

    def _make_room(self, length: int) -> None:
        capacity = self._buffer.shape[1]
        if length > capacity or self.length < self._shared:
            self._move(max(length, capacity + max(self._least, capacity // GROWTH)))

    def _move(self, capacity: int) -> None:
        old = self.view
        self._buffer, self._shared = old.new_empty(len(old), capacity, *old.shape[2:]), 0
        self._buffer[:, : self.length] = old


def _list(rows: Tensor) -> str:
    return ", ".join(map(str, rows.shape[2:]))


def products(query: Float[Tensor, "Hq D"], keys: Float[Tensor, "Hk N D"]) -> Float[Tensor, "Hq N"]:
    """q · k of every query head with the keys of its KV head, in fp32 whatever the inputs are.

    On a CPU, keys of lower precision are widened a run at a time, so that no copy of all of them
    is written to memory and read again: 13 ms for 32k tokens of 8 KV heads (128 dims, bf16, one
    AVX2 core) instead of 64 ms.
    """
    heads = len(keys)
    folded = query.float().unflatten(0, (heads, -1))  # [Hk, G, D]
    if keys.dtype == torch.float32 or keys.is_cuda:
        return (folded @ keys.float().mT).flatten(0, 1)
    run = max(1, CAST_ELEMENTS // (heads * keys.shape[2]))
    scores = folded.new_empty(*folded.shape[:2], keys.shape[1])
    for out, part in zip(scores.split(run, 2), keys.split(run, 1), strict=True):
        out[:] = folded @ part.float().mT
    return scores.flatten(0, 1)


def unit_max(scores: Float[Tensor, "Hq N"], unit: int) -> Float[Tensor, "Hq U"]:
    """The largest score of every `unit` tokens, a last, partial unit included."""
    units = -(-scores.shape[1] // unit)
    padded = F.pad(scores, (0, units * unit - scores.shape[1]), value=-torch.inf)
    return padded.unflatten(1, (units, unit)).amax(-1)
