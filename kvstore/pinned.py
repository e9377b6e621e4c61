"""KV of running requests in host memory that a GPU reads at full speed."""

import weakref

import torch

from kvstore.errors import PoolFull
from kvstore.pool import Pool
from kvstore.rows import PoolShape
from kvstore.spill import Spill

REGISTER = 1 | 2  # portable: for every context; mapped: kernels may read it at its own address


class PinnedTier(Pool):
    """A pool in host memory, page-locked where there is a GPU, once and whole.

    The slabs are registered, not taken from torch's pinned allocator, which rounds every one up
    to a power of two.

    Raises:
        PoolFull: also if the system does not allow to lock so much.
    """

    name = "pinned"
    setting = "pinned_bytes"

    def __init__(
        self, shape: PoolShape, capacity_bytes: int, *, spill: Spill | None = None
    ) -> None:
        super().__init__(shape, capacity_bytes, device="cpu", spill=spill)
        if torch.cuda.is_available():
            for layer in range(shape.num_layers):
                self._lock_pages(self.slab(layer))

    def _lock_pages(self, slab: torch.Tensor) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, REGISTER))
        if code:
            raise PoolFull(
                f"cannot page-lock {self.capacity_bytes} bytes for the {self.name} pool (CUDA "
                f"error {code}); lower {self.setting}"
            )
        weakref.finalize(slab, _unlock_pages, slab.data_ptr())


def _unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
