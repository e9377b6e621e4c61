"""KV of running requests in host memory that a GPU reads at full speed."""

import weakref
from contextlib import suppress

import torch

from kvstore.errors import PoolFull
from kvstore.pool.pool import Pool
from kvstore.pool.spill import Spill
from kvstore.rows import PoolShape

REGISTER = 1 | 2  # portable: for every context; mapped: kernels may read it at its own address


class PinnedTier(Pool):
    """A pool in host memory, page-locked for a GPU, once and whole.

    The slabs are registered, not taken from torch's pinned allocator, which rounds every one up
    to a power of two.

    Args:
        locked: whether a GPU reads it.
    Raises:
        PoolFull: also if the system does not allow to lock so much.
    """

    name = "pinned"
    setting = "pinned_bytes"

    def __init__(
        self,
        shape: PoolShape,
        capacity_bytes: int,
        *,
        spill: Spill | None = None,
        locked: bool = False,
    ) -> None:
        super().__init__(shape, capacity_bytes, device="cpu", spill=spill)
        if locked:
            for layer in range(shape.num_layers):
                self._lock_pages(self.slab(layer))

    def _lock_pages(self, slab: torch.Tensor) -> None:
        lock_pages(slab, f"the {self.name} pool", self.setting)


def lock_pages(buffer: torch.Tensor, what: str, setting: str) -> None:
    """Have a GPU read and write a buffer at full speed, as long as the buffer lives.

    Raises:
        PoolFull: the system does not allow to lock so much; says for what, and which setting to
            lower.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, REGISTER))
    if code:
        with suppress(RuntimeError):  # or the next launch, of somebody else, would report it
            torch.zeros(1, device="cuda")
        raise PoolFull(
            f"cannot page-lock {buffer.nbytes} bytes for {what} (CUDA error {code}); lower "
            f"{setting}"
        )
    weakref.finalize(buffer, _unlock_pages, buffer.data_ptr())


def _unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
