"""Cuts the unrotated KV of new tokens into blocks for the store."""

import sys
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from engine.model.pieces import Shape
from kvstore.block import KVBlock

Empty = Callable[[Sequence[int], torch.dtype], Tensor]


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory from the system."""
    return torch.empty(torch.Size(shape), dtype=dtype)


class Recorder:
    """Collects KV layer by layer, token by token, and hands over blocks as they fill.

    Blocks are filled on the model's device and leave it whole: one copy a block, none a layer.
    A loop that reads layer after layer completes no block before its end, and has them filled in
    host memory instead (`fill_on`): one copy a write, and there the whole prompt's KV once.

    Args:
        size: tokens per block.
        start: first token recorded, a multiple of `size`: what lies before is stored already.
        stop: only blocks that are complete with so many tokens are recorded; None for all.
        origin: where in the cache the token counted as 0 lies; what lies before is not recorded.
        empty: host memory for blocks; that of a store is faster than the system's.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        size: int,
        start: int,
        stop: int | None = None,
        origin: int = 0,
        empty: Empty = fresh,
    ) -> None:
        if start % size:
            raise ValueError(f"recording starts at a block border, a multiple of {size}: {start}")
        self.size = size
        self._origin = origin
        self._shape, self._device, self._empty = shape, shape.device, empty
        self._open: dict[int, Tensor] = {}  # block number -> [L 2 Hk P D]
        self._next = start // size
        self._end = sys.maxsize if stop is None else stop // size

    def write(
        self, layer: int, start: int, k: Float[Tensor, "Hk N D"], v: Float[Tensor, "Hk N D"]
    ) -> None:
        """Record unrotated keys and values of tokens [start, start + N) of one layer.

        What belongs to blocks that were taken, or lies before or behind all, is ignored.
        """
        start -= self._origin
        stop = start + k.shape[1]
        numbers = range(max(start // self.size, self._next), min(-(-stop // self.size), self._end))
        if numbers and k.device != self._device:
            k, v = torch.stack([k, v]).to(self._device)  # one copy, not two a block
        for number in numbers:
            base = number * self.size
            lo, hi = max(start, base), min(stop, base + self.size)
            block = self._block(number)[layer]
            block[0, :, lo - base : hi - base] = k[:, lo - start : hi - start]
            block[1, :, lo - base : hi - base] = v[:, lo - start : hi - start]

    def fill_on(self, device: torch.device) -> None:
        """From now on fill blocks on `device`; those that are not taken yet move there."""
        self._device = device
        self._open = {number: block.to(device) for number, block in self._open.items()}

    def open(self, stop: int) -> None:
        """Take the memory of all blocks of tokens before `stop`, from the caller's stream."""
        for number in range(self._next, min(-(-(stop - self._origin) // self.size), self._end)):
            self._block(number)

    def write_token(self, start: int, kv: Float[Tensor, "L 2 Hk D"]) -> None:
        """Record one token in all layers at once."""
        number, within = divmod(start - self._origin, self.size)
        if self._next <= number < self._end:
            self._block(number)[..., within, :] = kv

    def take(self, length: int) -> list[tuple[int, KVBlock]]:
        """Blocks complete once `length` tokens are, with their numbers; each is given once."""
        done = range(self._next, min((length - self._origin) // self.size, self._end))
        self._next = max(self._next, done.stop)
        return [(number, KVBlock(self._in_host(self._open.pop(number)))) for number in done]

    def rest(self, length: int) -> list[tuple[int, KVBlock]]:
        """What `take` leaves of `length` tokens: the last block, which is smaller, or nothing."""
        number, tokens = divmod(length - self._origin, self.size)
        if not tokens:
            return []
        return [(number, KVBlock(self._in_host(self._open.pop(number)[..., :tokens, :])))]

    def _block(self, number: int) -> Float[Tensor, "L 2 Hk P D"]:
        if number not in self._open:
            s = self._shape
            size = (s.num_layers, 2, s.num_kv_heads, self.size, s.head_dim)
            if self._device.type == "cpu":
                self._open[number] = self._empty(size, s.dtype)
            else:
                self._open[number] = torch.empty(size, dtype=s.dtype, device=self._device)
        return self._open[number]

    def _in_host(self, data: Float[Tensor, "L 2 Hk P D"]) -> Float[Tensor, "L 2 Hk P D"]:
        if data.device.type == "cpu" and data.is_contiguous():
            return data
        return self._empty(data.shape, data.dtype).copy_(data)
