"""Packed 4-bit codes of the slots of a batch, for a fixed capacity."""

import torch
from jaxtyping import Float16, UInt8
from torch import Tensor

from retrieval.codes import BLOCK
from retrieval.index import State


class DeviceCodes:
    """What `retrieval.codes.Codes` is to one request, for B slots; lengths live with the caller.

    Args:
        capacity: tokens; memory is taken for whole blocks of 32.
        scaled: whether tokens have a scale.
    """

    def __init__(
        self,
        slots: int,
        num_kv_heads: int,
        subspaces: int,
        capacity: int,
        *,
        scaled: bool,
        device: torch.device | str,
    ) -> None:
        blocks = -(-capacity // BLOCK)
        shape = (slots, num_kv_heads, blocks, subspaces, BLOCK // 2)
        self.packed: UInt8[Tensor, "B Hk N M 16"] = torch.zeros(
            shape, dtype=torch.uint8, device=device
        )
        self.scales: Float16[Tensor, "B Hk T"] | None = (
            torch.zeros(*shape[:2], blocks * BLOCK, dtype=torch.float16, device=device)
            if scaled
            else None
        )
        self._capacity = capacity

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def check(self, state: State) -> None:
        """Raises ValueError if codes of this state do not fit a slot."""
        heads, _, subspaces, _ = state["packed"].shape
        length, (_, own_heads, _, own_subspaces, _) = int(state["length"]), self.packed.shape
        if (heads, subspaces) != (own_heads, own_subspaces):
            raise ValueError(
                f"a slot holds {own_subspaces} codes a token for {own_heads} KV heads, the index "
                f"has {subspaces} for {heads}"
            )
        if length > self._capacity:
            raise ValueError(
                f"a slot has room for {self._capacity} tokens, the index has {length}: make the "
                "batch with a larger capacity"
            )

    def adopt(self, slot: int, state: State) -> None:
        """Copy the codes of a state that was checked."""
        packed = state["packed"]
        self.packed[slot, :, : packed.shape[1]].copy_(packed)
        if self.scales is not None:
            self.scales[slot, :, : state["scales"].shape[1]].copy_(state["scales"])
