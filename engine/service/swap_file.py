"""Pieces of requests' KV on disk: each holds some tokens, in all layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from engine.model.pieces import Shape
from kvstore.errors import PoolFull
from kvstore.pool.spill import Spill
from native.pages import own_pages

PIECE_BYTES = 1 << 20
RUN_TOKENS = 1024  # read or written together, so that 4096 tokens pass a bus in four copies


@dataclass(slots=True)
class OnDisk:
    """The start of a request's KV: which pieces, and how many tokens they hold."""

    numbers: list[int] = field(default_factory=list)
    tokens: int = 0


class SwapFile:
    """Numbered pieces of a spill, all of one size, so that the file stays as small as they are.

    Takes, beside what the caller counts, memory for two runs of pieces, one each way: one caller
    may write while another reads.

    Raises:
        PoolFull: the spill's budget holds no piece.
    """

    def __init__(self, shape: Shape, spill: Spill) -> None:
        self.spill = spill
        self.piece_tokens = max(1, PIECE_BYTES // shape.kv_bytes_per_token)
        self.piece_bytes = self.piece_tokens * shape.kv_bytes_per_token
        cost = spill.cost(self.piece_bytes)
        self.count = spill.capacity_bytes // cost
        if not self.count:
            raise PoolFull(
                f"{Spill.setting} {spill.capacity_bytes} holds no piece of a request's KV, which "
                f"takes {cost} bytes: raise it, or leave out spill_path"
            )
        self._free = list(range(self.count))[::-1]
        run = -(-RUN_TOKENS // self.piece_tokens)
        self.run_tokens = run * self.piece_tokens
        piece = (shape.num_layers, 2, shape.num_kv_heads, self.piece_tokens, shape.head_dim)
        self._written = own_pages((run, *piece), shape.dtype)
        self._read = own_pages((run, *piece), shape.dtype)

    @property
    def free(self) -> int:
        """Pieces that nobody has."""
        return len(self._free)

    def pieces(self, tokens: int) -> int:
        """How many pieces so many tokens take."""
        return -(-tokens // self.piece_tokens)

    def copies(self, tokens: int) -> int:
        """In which so many tokens come from the device, or go there."""
        return -(-tokens // self.run_tokens)

    def extend(
        self, held: OnDisk, source: Float[Tensor, "L 2 Hk T D"], first: int, stop: int
    ) -> int:
        """Add tokens [held.tokens, stop) of a request; returns the bytes written.

        Args:
            source: the request's tokens from `first` on, which is at most `held.tokens`; on any
                device if it is 0. What it lacks of a last piece that is not full is read.
        Raises:
            StoreError: it cannot be written; `held` is as before.
            CorruptRecord: that last piece is damaged; as before, too.
        """
        size, start = self.piece_tokens, len(held.numbers) * self.piece_tokens
        if start > held.tokens:
            start -= size
        taken = [self._free.pop() for _ in range(self.pieces(stop) - len(held.numbers))]
        numbers = held.numbers + taken
        try:
            if first > start:
                self._fetch([numbers[start // size]], self._written)
            for lo in range(start, stop, self.run_tokens):
                span = numbers[lo // size : self.pieces(min(stop, lo + self.run_tokens))]
                self._stage(source, first, lo, min(stop, lo + self.run_tokens))
                self.spill.write([*zip(span, _bytes(self._written), strict=False)])
        except BaseException:
            self._free += taken
            raise
        written = len(numbers) - start // size
        held.numbers, held.tokens = numbers, stop
        return written * self.piece_bytes

    def read(self, held: OnDisk, slab: Float[Tensor, "L 2 Hk C D"]) -> int:
        """Fill the start of a slab, on any device; returns the bytes read. As `Spill.read`."""
        size = self.piece_tokens
        for lo in range(0, held.tokens, self.run_tokens):
            stop = min(held.tokens, lo + self.run_tokens)
            numbers = held.numbers[lo // size : self.pieces(stop)]
            self._fetch(numbers, self._read)
            here = self._read[: len(numbers)].to(slab.device)
            for piece, at in zip(here, range(lo, stop, size), strict=True):
                some = min(size, stop - at)
                slab[:, :, :, at : at + some] = piece[:, :, :, :some]
        return len(held.numbers) * self.piece_bytes

    def shorten(self, held: OnDisk) -> None:
        """Free the last piece of a request."""
        self._free.append(held.numbers.pop())
        held.tokens = len(held.numbers) * self.piece_tokens

    def free_all(self, held: OnDisk) -> None:
        """Free all pieces of a request."""
        self._free += held.numbers
        held.numbers, held.tokens = [], 0

    def check(self, held: Iterable[OnDisk]) -> None:
        """AssertionError unless every piece is free or of one request, which needs it."""
        all_held = list(held)
        numbers = [number for each in all_held for number in each.numbers]
        assert sorted(numbers + self._free) == list(range(self.count)), "pieces lost, or had twice"
        for each in all_held:
            assert len(each.numbers) == self.pieces(each.tokens)

    def close(self) -> None:
        """Delete the file."""
        self.spill.close()

    def _stage(self, source: Tensor, first: int, lo: int, stop: int) -> None:
        """Tokens [lo, stop) into the memory that is written from, as far as `source` has them."""
        size, count = self.piece_tokens, self.pieces(stop - lo)
        staged = self._written[:count]
        if source.device != staged.device:
            staged = torch.empty_like(staged, device=source.device)
        for piece, at in zip(staged, range(lo, stop, size), strict=True):
            a, b = max(at, first), min(at + size, stop)
            piece[:, :, :, a - at : b - at] = source[:, :, :, a - first : b - first]
        if staged.device != self._written.device:
            self._written[:count] = staged

    def _fetch(self, numbers: Sequence[int], out: Float[Tensor, "R L 2 Hk P D"]) -> None:
        self.spill.read([*zip(numbers, _bytes(out), strict=False)])


def _bytes(pieces: Float[Tensor, "R L 2 Hk P D"]) -> list[UInt8[np.ndarray, " bytes"]]:
    return list(pieces.flatten(1).view(torch.uint8).numpy())
