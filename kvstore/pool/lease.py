"""What one running request has of a pool: its blocks, and the tokens in them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from kvstore.errors import StoreError
from kvstore.pool.slots import Numbers, Slots
from kvstore.rows import PoolShape, TokenKV, words

WRITE_NUMBERS = 1 << 20  # of K encoded at once, and of V: at most 4 MiB where that takes fp32
DEVICE_NUMBERS = 16 * WRITE_NUMBERS  # on a GPU, where many small operations cost more than memory
Found = tuple[Int64[Tensor, " some"] | None, Int64[Tensor, " some"]]


@runtime_checkable
class Blocks(Protocol):
    """What a lease needs of the pool that gave it; see `Pool` for each of these."""

    name: str
    shape: PoolShape
    device: torch.device
    head_rows: Int64[Tensor, "Hk 1"]

    @property
    def stationary(self) -> bool: ...
    def slab(self, layer: int) -> UInt8[Tensor, "slots Hk P row"]: ...
    def flat(self, layer: int) -> UInt8[Tensor, "rows row"]: ...
    def slots(self, layer: int) -> Slots | None: ...
    def take(self, count: int) -> list[int]: ...
    def give_back(self, lease: "Lease") -> None: ...


class Lease:
    """The blocks of one request: block i holds its tokens from i * block_tokens, in every layer.

    For one thread at a time; several leases of a pool may be used at once. Tokens are written
    in order, and may be written again. Those not yet written cannot be read: there lies
    what another request left.

    Raises:
        StoreError: for everything, once closed.
    """

    def __init__(self, pool: Blocks, name: str) -> None:
        self.name = name
        self._pool = pool
        self._shift = pool.shape.block_tokens.bit_length() - 1
        self._block_rows = pool.shape.num_kv_heads * pool.shape.block_tokens
        self._written = [0] * pool.shape.num_layers
        self._open = True
        self._sent: torch.cuda.Event | None = None  # when rows from a GPU are all there
        self.table = self._tensor([])  # the blocks, by their numbers in the pool
        self._firsts = self.table  # the first row of each, where they are stationary

    @property
    def reserved(self) -> int:
        """Tokens there is room for."""
        return len(self.table) << self._shift

    @property
    def nbytes(self) -> int:
        """Of its blocks in all layers, in memory or not."""
        return len(self.table) * self._pool.shape.block_bytes

    def written(self, layer: int) -> int:
        """Tokens there are in a layer."""
        return self._written[layer]

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens. Raises PoolFull, having taken nothing."""
        self._check_open()
        missing = -(-tokens >> self._shift) - len(self.table)
        if missing > 0:
            self.table = torch.cat([self.table, self._tensor(self._pool.take(missing))])
            self._firsts = self.table * self._block_rows

    def write(
        self, layer: int, start: int, k: Float[Tensor, "Hk N D"] | None, v: Float[Tensor, "Hk N D"]
    ) -> None:
        """Encode N tokens from `start` on, on any device. ValueError for a gap, or without room.

        Run by run, so that the memory it takes meanwhile does not grow with N.
        """
        self._check_open()
        stop = start + v.shape[1]
        if not 0 <= start <= self._written[layer] or stop > self.reserved:
            raise ValueError(
                f"{self.name}: tokens {start} to {stop} of layer {layer} must follow the "
                f"{self._written[layer]} written, within the {self.reserved} reserved"
            )
        numbers = WRITE_NUMBERS if v.device.type == "cpu" else DEVICE_NUMBERS
        run = max(1, numbers // (len(v) * v.shape[2]))
        for lo in range(0, stop - start, run):
            part = slice(lo, lo + run)
            self._put(layer, start + lo, None if k is None else k[:, part], v[:, part])
        self._written[layer] = max(self._written[layer], stop)

    def rows(self, ids: Int[Tensor, "Hk K"]) -> Int64[Tensor, "Hk K"]:
        """Row numbers of tokens in `Pool.flat` of any layer, for pools that are stationary.

        Those of several leases may be joined, for one read of all. Not checked: see `gather`.
        """
        self._check_open()
        if not self._pool.stationary:
            raise StoreError(f"rows move in a {self._pool.name} pool with a spill: use `held`")
        firsts = self._firsts.index_select(0, (ids >> self._shift).reshape(-1))
        return firsts.view(ids.shape).add_(self._within(ids))

    @contextmanager
    def held(self, layer: int, ids: Int[Tensor, "Hk K"]) -> Iterator[Int64[Tensor, "Hk K"]]:
        """Row numbers of tokens in one layer, in memory and at rest meanwhile, in every pool.

        Raises:
            PoolFull: if their blocks do not fit into memory together; `gather` needs no more
                than one.
        """
        self._check(layer, ids)
        slots = self._pool.slots(layer)
        if slots is None:
            yield self.rows(ids)
            return
        numbers, touched = self._touched(ids)
        with slots.pinned(self.table.numpy()[touched]) as at:
            firsts = self._firsts_of(touched, at)
            yield firsts[numbers].view(ids.shape) + self._within(ids)

    def gather(self, layer: int, ids: Int[Tensor, "Hk K"]) -> TokenKV:
        """K and V of chosen tokens. Raises ValueError for one that is not written (on a CPU)."""
        self._check(layer, ids)
        self._wait_for_sent()
        flat = words(self._pool.flat(layer))
        out: Tensor | None = None
        with self._at_rest(layer):
            for chosen, rows in self._passes(layer, ids):
                found = flat.index_select(0, rows)
                if chosen is None:
                    out = found
                else:
                    out = flat.new_empty(ids.numel(), flat.shape[1]) if out is None else out
                    out.index_copy_(0, chosen, found)
        out = flat.new_empty(0, flat.shape[1]) if out is None else out
        return self._pool.shape.layout.decode(out.view(torch.uint8).unflatten(0, ids.shape))

    def read(self, layer: int, start: int, stop: int) -> TokenKV:
        """K and V of tokens [start, stop)."""
        return self.gather(layer, self._run(start, stop))

    def promote(self, layer: int, ids: Int[Tensor, "Hk K"]) -> None:
        """Bring tokens into memory ahead of their use, as far as there is room for them."""
        self._check(layer, ids)
        with self._at_rest(layer):
            next(self._passes(layer, ids), None)

    def close(self) -> None:
        """Free the blocks. Idempotent."""
        if self._open:
            self._open = False
            self._wait_for_sent()  # the memory is somebody else's next
            self._pool.give_back(self)
            self.table = self._firsts = self._tensor([])

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, layer: int, start: int, k: Tensor | None, v: Tensor) -> None:
        rows = self._pool.shape.layout.encode(k, v)
        if rows.device != self._pool.device and self._pool.stationary:
            self._send(layer, start, rows)
            return
        encoded = words(rows.to(self._pool.device).flatten(0, 1))
        flat, ids = words(self._pool.flat(layer)), self._run(start, start + v.shape[1])
        with self._at_rest(layer):
            for chosen, rows in self._passes(layer, ids, writing=True):
                flat.index_copy_(0, rows, encoded if chosen is None else encoded[chosen])

    def _send(self, layer: int, start: int, rows: UInt8[Tensor, "Hk N row"]) -> None:
        """Rows from another device, blocks that lie side by side in one copy.

        From a GPU to page-locked memory the host does not wait for them; `gather` and `close` do.
        """
        size, slab = self._pool.shape.block_tokens, self._pool.slab(layer)
        for block, lo, hi in self._stretches(start, start + rows.shape[1]):
            part, base = rows[:, lo - start : hi - start], lo // size * size
            if lo > base or (hi - lo) % size:
                slab[block, :, lo - base : hi - base] = part
                continue
            whole = part.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
            slab[block : block + len(whole)].copy_(whole, non_blocking=True)
        if rows.is_cuda:
            self._sent = torch.cuda.current_stream(rows.device).record_event()

    def _wait_for_sent(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Tokens [lo, hi) that lie side by side from a block on: whole blocks, or a part of one."""
        size = self._pool.shape.block_tokens
        begun = start // size
        table = self.table[begun : -(-stop // size)].tolist()
        lo = start
        while lo < stop:
            first = lo // size
            hi = min(stop, (first + 1) * size)
            whole = lo == first * size and hi - lo == size
            while whole and hi + size <= stop and self._adjoins(table, hi // size - begun):
                hi += size
            yield table[first - begun], lo, hi
            lo = hi

    @staticmethod
    def _adjoins(table: list[int], i: int) -> bool:
        """Whether a block lies right behind the one before it."""
        return table[i] == table[i - 1] + 1

    def _at_rest(self, layer: int) -> AbstractContextManager[object]:
        """In which no block of the layer moves but by `_passes`."""
        slots = self._pool.slots(layer)
        return nullcontext() if slots is None else slots.lock

    def _passes(self, layer: int, ids: Tensor, *, writing: bool = False) -> Iterator[Found]:
        """Where ids are, all that can be in memory at a time: which of them (None: all), rows."""
        slots = self._pool.slots(layer)
        if slots is None:
            yield None, self.rows(ids).view(-1)
            return
        numbers, touched = self._touched(ids)
        within = self._within(ids).view(-1)
        for part, at in slots.passes(self.table.numpy()[touched], writing=writing):
            firsts = self._firsts_of(touched[part], at)[numbers]
            chosen = None if len(part) == len(touched) else (firsts >= 0).nonzero().view(-1)
            rows = firsts + within
            yield chosen, rows if chosen is None else rows[chosen]

    def _touched(self, ids: Tensor) -> tuple[Int64[Tensor, " ids"], Numbers]:
        """The number of each id's block in the table, and all of these numbers."""
        numbers = (ids >> self._shift).reshape(-1).long()
        marked = np.zeros(len(self.table), bool)
        marked[numbers.numpy()] = True
        return numbers, np.flatnonzero(marked)

    def _firsts_of(self, touched: Numbers, slots: Numbers) -> Int64[Tensor, " n"]:
        """The first row of each of the table's blocks; negative for others than `touched`."""
        firsts = torch.full((len(self.table),), -self._block_rows)
        firsts.numpy()[touched] = slots * self._block_rows
        return firsts

    def _within(self, ids: Tensor) -> Int64[Tensor, "Hk K"]:
        """Of the rows of its block, which one is each id's."""
        return (ids & (self._pool.shape.block_tokens - 1)) + self._pool.head_rows

    def _run(self, start: int, stop: int) -> Int64[Tensor, "Hk K"]:
        ids = torch.arange(start, stop, device=self._pool.device)
        return ids.expand(self._pool.shape.num_kv_heads, -1)

    def _tensor(self, numbers: list[int]) -> Int64[Tensor, " n"]:
        return torch.tensor(numbers, dtype=torch.int64, device=self._pool.device)

    def _check(self, layer: int, ids: Tensor) -> None:
        """On a GPU ids are not looked at, which would wait for it."""
        self._check_open()
        if ids.device.type != "cpu" or not ids.numel():
            return
        least, most = (int(x) for x in ids.aminmax())
        if least < 0 or most >= self._written[layer]:
            raise ValueError(
                f"{self.name}: tokens {least} to {most} of layer {layer} wanted, "
                f"{self._written[layer]} written"
            )

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError(f"{self.name} is closed")
