"""Codes of 4 bits, packed so that a byte shuffle looks up 16 of them at once."""

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor
from torch.nn import functional as F

from retrieval.index import State
from retrieval.pending import Rows

BLOCK = 32  # tokens packed together


class Codes:
    """M codes of 0..15 per token and KV head, and a scale for each token where the method has one.

    Blocks of 32 tokens, sub-space by sub-space, as FAISS's fast scan lays them out (André et al.
    2015; Douze et al. 2024), and one byte for two tokens:

        packed[h, block, m, i] = code of token i | code of token i + 16 << 4

    What stands for tokens that the last block does not have yet means nothing.

    Args:
        scaled: whether tokens have a scale: kept in fp16, which must hold them: finite, >= 0.
    """

    def __init__(
        self,
        num_kv_heads: int,
        subspaces: int,
        *,
        scaled: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length = 0
        shape = (subspaces, BLOCK // 2)
        self._packed = Rows(num_kv_heads, shape, torch.uint8, device, least=1)
        self._scales = Rows(num_kv_heads, (), torch.float16, device) if scaled else None

    @classmethod
    def from_state(cls, state: State) -> "Codes":
        """The codes whose `state` this is; shares its tensors until the next append."""
        packed, scales = state["packed"], state.get("scales")
        codes = cls(len(packed), packed.shape[2], scaled=scales is not None, device=packed.device)
        codes.length = int(state["length"])
        codes._packed = Rows.of(packed)
        codes._scales = None if scales is None else Rows.of(scales)
        return codes

    def state(self) -> State:
        """All of it as tensors: views, not copies."""
        state = {"packed": self.packed, "length": torch.tensor(self.length)}
        return state if self.scales is None else {**state, "scales": self.scales}

    @property
    def packed(self) -> UInt8[Tensor, "Hk blocks M 16"]:
        """All blocks, begun or full. Heads lie apart, all else is contiguous."""
        return self._packed.view

    @property
    def scales(self) -> Float16[Tensor, "Hk T"] | None:
        """One number per token; contiguous within a head."""
        return None if self._scales is None else self._scales.view

    @property
    def subspaces(self) -> int:
        """Codes per token."""
        return self._packed.view.shape[2]

    @property
    def nbytes(self) -> int:
        """Of both, room to grow included."""
        return self._packed.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens in all, and no more."""
        self._packed.reserve(-(-tokens // BLOCK))
        if self._scales is not None:
            self._scales.reserve(tokens)

    def append(
        self, codes: UInt8[Tensor, "Hk N M"], scales: Float[Tensor, "Hk N"] | None = None
    ) -> None:
        """The codes of the next N tokens; a last block that is not full is written anew.

        Raises:
            ValueError: if scales are given and not kept, or the other way round.
        """
        if (scales is None) != (self._scales is None):
            raise ValueError("scales come with every token of scaled codes, and with no others")
        self._append_blocks(codes)
        if self._scales is not None and scales is not None:
            self._scales.append(scales.half())
        self.length += codes.shape[1]

    def _append_blocks(self, codes: Tensor) -> None:
        full, begun = divmod(self.length, BLOCK)
        if begun:
            codes = torch.cat([unpacked(self.packed[:, -1:])[:, :begun], codes], 1)
        self._packed.rewind(full)
        self._packed.append(packed(F.pad(codes, (0, 0, 0, -codes.shape[1] % BLOCK))))


def packed(codes: UInt8[Tensor, "Hk tokens M"]) -> UInt8[Tensor, "Hk blocks M 16"]:
    """Full blocks of codes, packed."""
    blocks = codes.unflatten(1, (-1, 2, BLOCK // 2))  # [Hk, blocks, low | high, 16, M]
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).mT.contiguous()


def unpacked(packed: UInt8[Tensor, "Hk blocks M 16"]) -> UInt8[Tensor, "Hk tokens M"]:
    """Codes of full blocks, token by token."""
    return torch.stack([packed & 15, packed >> 4], 2).mT.flatten(1, 3)
