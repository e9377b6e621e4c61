"""The part of a layer's KV that is on the device: rows of the tokens attended to last."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvstore.rows import RowLayout, TokenKV
from retrieval.pending import GROWTH

FREE = -1
PINNED = 1 << 62  # a use that never grows old


class Resolved(NamedTuple):
    """Where tokens are in the buffer, and which of them are not there yet."""

    slots: Int[Tensor, "Hk K"]  # those of misses are theirs already, and hold something else
    miss: Bool[Tensor, "Hk K"]


class HotTables(NamedTuple):
    """A buffer's contents; see `kvstore.kernels.resolve.Residency`."""

    rows: UInt8[Tensor, "Hk S bytes"]
    slot: Int[Tensor, "Hk T"]
    token: Int[Tensor, "Hk S"]
    used: Int[Tensor, "Hk S"]


class HotBuffer:
    """Slots for the rows of tokens of one layer and request, least recently used first out.

    Every KV head has its own slots and its own order. All tables are tensors on the device, so
    that nothing is copied to the host to find out what is where (HiSparse, SGLang 2026).

    Args:
        slots: of each head; at least as many as tokens are asked for at once.
        layout: of a row; the numbers themselves, ready to attend to.
    """

    def __init__(
        self, num_kv_heads: int, slots: int, layout: RowLayout, device: torch.device
    ) -> None:
        self.layout, self.num_slots = layout, slots
        size = (num_kv_heads, slots, layout.row_bytes)
        self._rows = torch.empty(size, dtype=torch.uint8, device=device)
        self._token = torch.full((num_kv_heads, slots), FREE, device=device)
        self._used = torch.zeros(num_kv_heads, slots, dtype=torch.int64, device=device)
        self._slot = torch.empty(num_kv_heads, 0, dtype=torch.int32, device=device)
        self._heads = torch.arange(num_kv_heads, device=device)[:, None]
        self._now = 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self._rows, self._token, self._used, self._slot))

    @property
    def flat(self) -> UInt8[Tensor, "N bytes"]:
        """All rows, as `numbers` counts them."""
        return self._rows.view(-1, self.layout.row_bytes)

    def numbers(self, slots: Int[Tensor, "Hk K"]) -> Int[Tensor, "Hk K"]:
        """Numbers of the rows in `flat`."""
        return slots + self._heads * self.num_slots

    def resolve(self, tokens: Int[Tensor, "Hk K"]) -> Resolved:
        """Find tokens, each once a head; give those that are missing slots, which are theirs now.

        The caller writes the rows of what missed before anybody reads them.
        """
        self._reserve(int(tokens.max()) + 1 if tokens.numel() else 0)
        self._now += 1
        slots = self._slot[self._heads, tokens].long()
        miss = slots < 0
        self._used[self._heads.expand_as(slots)[~miss], slots[~miss]] = self._touch(slots, miss)
        if miss.any():
            slots = self._give(tokens, slots, miss)
        return Resolved(slots, miss)

    def write(self, slots: Int[Tensor, " n"], heads: Int[Tensor, " n"], rows: Tensor) -> None:
        """Fill slots with rows [n, bytes]."""
        self._rows[heads, slots] = rows

    def insert(
        self,
        tokens: Int[Tensor, "Hk K"],
        k: Float[Tensor, "Hk K D"],
        v: Float[Tensor, "Hk K D"],
        *,
        pinned: bool = False,
    ) -> None:
        """Put tokens here whose KV is at hand; `pinned` ones never leave."""
        slots, _ = self.resolve(tokens)
        self._rows[self._heads, slots] = self.layout.encode(k, v)
        if pinned:
            self._used[self._heads, slots] = PINNED

    def read(self, slots: Int[Tensor, "Hk K"]) -> TokenKV:
        """K and V of slots, in the order asked for."""
        rows = self.flat.index_select(0, self.numbers(slots).flatten())
        return self.layout.decode(rows.view(*slots.shape, -1))

    def tables(self, now: int) -> HotTables:
        """What is here, as a batch whose clock shows `now` counts it."""
        used = (self._used - self._now + now).clamp(0, now)
        used = torch.where(self._used == PINNED, torch.iinfo(torch.int32).max, used)
        used = torch.where(self._token == FREE, FREE, used)
        return HotTables(self._rows, self._slot, self._token, used)

    def _touch(self, slots: Tensor, miss: Tensor) -> Tensor:
        """When the slots of hits were used last: now, unless they are pinned."""
        used = self._used[self._heads.expand_as(slots)[~miss], slots[~miss]]
        return torch.where(used == PINNED, used, self._now)

    def _give(self, tokens: Tensor, slots: Tensor, miss: Tensor) -> Int[Tensor, "Hk K"]:
        """Slots for what is missing: in each head those used longest ago."""
        most = int(miss.sum(1).max())
        victims = self._used.topk(min(most, self.num_slots), 1, largest=False).indices
        rank = miss.long().cumsum(1).sub_(1).clamp_(0, self.num_slots - 1)
        slots = torch.where(miss, victims.gather(1, rank), slots)
        heads, mine, new = self._heads.expand_as(slots)[miss], slots[miss], tokens[miss]
        if most > self.num_slots or bool((self._used[heads, mine] >= self._now).any()):
            raise ValueError(
                f"more than {self.num_slots} slots are needed at once: raise method.hot"
            )
        old = self._token[heads, mine]
        there = old >= 0
        self._slot[heads[there], old[there]] = FREE
        self._token[heads, mine] = new
        self._slot[heads, new] = mine.to(torch.int32)
        self._used[heads, mine] = self._now
        return slots

    def _reserve(self, tokens: int) -> None:
        """Room in the table of tokens; it grows as indexes do."""
        have = self._slot.shape[1]
        if tokens > have:
            more = max(tokens, have + have // GROWTH) - have
            fresh = self._slot.new_full((len(self._slot), more), FREE)
            self._slot = torch.cat([self._slot, fresh], 1)
