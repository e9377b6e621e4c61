"""Codes of the slots of a batch, for a fixed capacity: packed ones of 4 bits, and wider ones."""

import torch
from jaxtyping import Float16, Int32, Shaped, UInt8
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

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def check(self, state: State) -> None:
        """Raises ValueError if codes of this state do not fit a slot."""
        heads, _, subspaces, _ = state["packed"].shape
        _, own_heads, _, own_subspaces, _ = self.packed.shape
        if (heads, subspaces) != (own_heads, own_subspaces):
            raise ValueError(
                f"a slot holds {own_subspaces} codes a token for {own_heads} KV heads, the index "
                f"has {subspaces} for {heads}"
            )

    def adopt(self, slot: int, state: State) -> None:
        """Copy the codes of a state that was checked."""
        packed = state["packed"]
        self.packed[slot, :, : packed.shape[1]].copy_(packed)
        if self.scales is not None:
            self.scales[slot, :, : state["scales"].shape[1]].copy_(state["scales"])


def put_codes(
    codes: Shaped[Tensor, "B Hk T M"],
    fresh: Shaped[Tensor, "B Hk M"],
    positions: Int32[Tensor, " B"],
) -> None:
    """Write the codes of token `positions[b]` of each slot; nothing where that is negative."""
    slots = torch.arange(len(codes), device=codes.device)
    there, place = (positions >= 0)[:, None, None], positions.clamp(min=0).long()
    codes[slots, :, place] = fresh.where(there, codes[slots, :, place])
