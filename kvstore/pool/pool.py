"""Memory for K and V of all running requests."""

import threading

import torch
from jaxtyping import UInt8
from torch import Tensor

from kvstore.errors import PoolFull, StoreError
from kvstore.pool.lease import Lease
from kvstore.pool.slots import Slots, SpillStats
from kvstore.pool.spill import Spill
from kvstore.rows import PoolShape


class Pool:
    """Blocks of rows for any number of requests, in one slab a layer. Thread-safe.

    All memory is asked for at once and none later; on a CPU the system backs it as it is used.
    Huge pages were tried for the slabs: 16,384 rows of 512 B out of 512 MiB take 1.43 ms with
    and 1.42 without.

    With a spill, the slabs hold the blocks used last and the disk the others: requests may then
    have as many blocks as fit in the spill's budget. The pool closes it.

    Args:
        capacity_bytes: of the slabs.
    Raises:
        PoolFull: naming the setting, if the budget holds no block, or the machine not the budget.
        ValueError: if a spill holds no more than the slabs, or these are not in host memory.
    """

    name = "pool"
    setting = "capacity_bytes"

    def __init__(
        self,
        shape: PoolShape,
        capacity_bytes: int,
        *,
        device: torch.device | str = "cpu",
        spill: Spill | None = None,
    ) -> None:
        self.shape, self.capacity_bytes, self.device = shape, capacity_bytes, torch.device(device)
        self._spill = spill
        whole = f"{self.name} pool"
        in_memory = self._fitting(capacity_bytes, shape.block_bytes, whole, self.setting)
        self.num_blocks = in_memory if spill is None else self._spillable(spill, in_memory)
        self._slabs = [self._slab(in_memory) for _ in range(shape.num_layers)]
        self._slots: list[Slots] = []
        if spill is not None:
            layers = enumerate(self._slabs)
            self._slots = [Slots(i, s, self.num_blocks, spill, self.setting) for i, s in layers]
        heads = torch.arange(shape.num_kv_heads, device=self.device)
        self.head_rows = heads[:, None] * shape.block_tokens  # of each head's first in a block
        self._free = list(range(self.num_blocks))[::-1]
        self._leases: dict[int, Lease] = {}
        self._count = 0
        self._lock = threading.Lock()

    @property
    def stationary(self) -> bool:
        """Whether rows stay where they are: without a spill."""
        return not self._slots

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def open_leases(self) -> int:
        """Requests that have blocks, or may take some."""
        return len(self._leases)

    @property
    def used_bytes(self) -> int:
        """Of the blocks that requests have, in memory or not."""
        return (self.num_blocks - self.free_blocks) * self.shape.block_bytes

    @property
    def nbytes(self) -> int:
        """Of the memory the slabs take, used or not."""
        return sum(slab.untyped_storage().nbytes() for slab in self._slabs)

    def slab(self, layer: int) -> UInt8[Tensor, "slots Hk P row"]:
        """The memory of one layer, contiguous, for kernels that attend in place."""
        return self._slabs[layer]

    def flat(self, layer: int) -> UInt8[Tensor, "rows row"]:
        """The memory of one layer as the rows that `Lease.rows` numbers."""
        return self._slabs[layer].view(-1, self.shape.layout.row_bytes)

    def slots(self, layer: int) -> Slots | None:
        """Which blocks of a layer are in memory; None if all are, always."""
        return self._slots[layer] if self._slots else None

    def stats(self) -> SpillStats:
        """Of all layers."""
        return sum((slots.stats for slots in self._slots), SpillStats())

    def lease(self, name: str | None = None) -> Lease:
        """Nothing yet, for one request. The name is for errors."""
        with self._lock:
            self._count += 1
            lease = Lease(self, name or f"lease {self._count}")
            self._leases[id(lease)] = lease
            return lease

    def take(self, count: int) -> list[int]:
        """Blocks that nobody has, all of them or PoolFull."""
        with self._lock:
            if count > len(self._free):
                setting = self.setting if self._spill is None else self._spill.setting
                raise PoolFull(
                    f"{self.name} pool full: {count} more blocks needed, {len(self._free)} of "
                    f"{self.num_blocks} free, each of {self.shape.block_bytes} bytes; raise "
                    f"{setting}, or wait for a request to end"
                )
            return [self._free.pop() for _ in range(count)]

    def give_back(self, lease: Lease) -> None:
        """End a lease; its blocks are free."""
        blocks = lease.table.cpu().numpy()
        for slots in self._slots:
            slots.forget(blocks)
        with self._lock:
            self._free += blocks[::-1].tolist()
            del self._leases[id(lease)]

    def close(self) -> None:
        """Free the memory. Raises StoreError, naming them, while there are open leases."""
        with self._lock:
            if self._leases:
                names = ", ".join(lease.name for lease in self._leases.values())
                raise StoreError(f"{self.name} pool still has open leases: {names}; close them")
            self._slabs, self._slots, self._free, self.num_blocks = [], [], [], 0
        if self._spill is not None:
            self._spill.close()

    def _spillable(self, spill: Spill, in_memory: int) -> int:
        if self.device.type != "cpu":
            raise ValueError(f"only pools in host memory spill, not one on {self.device}")
        cost = self.shape.num_layers * spill.cost(self.shape.layer_bytes)
        count = self._fitting(spill.capacity_bytes, cost, "spill", spill.setting)
        if count <= in_memory:
            raise PoolFull(
                f"{spill.setting} {spill.capacity_bytes} holds {count} blocks of {cost} bytes, no "
                f"more than the {in_memory} in memory: raise it, lower {self.setting}, or do "
                "without a spill"
            )
        return count

    def _fitting(self, capacity_bytes: int, block_bytes: int, what: str, setting: str) -> int:
        if capacity_bytes < block_bytes:
            raise PoolFull(
                f"a {what} of {capacity_bytes} bytes holds no block, which takes "
                f"{block_bytes}; raise {setting}"
            )
        return capacity_bytes // block_bytes

    def _slab(self, count: int) -> UInt8[Tensor, "slots Hk P row"]:
        s = self.shape
        size = (count, s.num_kv_heads, s.block_tokens, s.layout.row_bytes)
        try:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:  # torch's, on any device, when there is no memory
            raise PoolFull(
                f"cannot have {self.capacity_bytes} bytes on {self.device} for the {self.name} "
                f"pool ({error}); lower {self.setting}"
            ) from error
