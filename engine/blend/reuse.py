"""Where the KV of every token of a prompt comes from, and the blocks in which it is repaired."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from engine.blend.segments import Segments

BLOCK_TOKENS = 16  # repaired or not together: contiguous runs keep the causal mask cheap and exact
FRESH, EXACT = -1, -2


@dataclass(frozen=True, slots=True)
class Reuse:
    """What is loaded, what is computed, and what may be repaired.

    Args:
        owner: number of the block that a token of a chunk belongs to; `EXACT` for those whose
            stored KV is that of a full prefill; `FRESH` for those that have none.
        chunk, order: of each block, the number of its chunk and its own number within it.
        sizes: tokens of each block.
    """

    owner: Int[Tensor, " N"]
    chunk: Int[Tensor, " n"]
    order: Int[Tensor, " n"]
    sizes: Int[Tensor, " n"]

    @property
    def reusable(self) -> int:
        """Tokens of all blocks: what a share is a share of."""
        return int(self.sizes.sum())

    @property
    def nothing(self) -> Float[Tensor, " n"]:
        """Zero for every block."""
        return torch.zeros(len(self.sizes), device=self.sizes.device)

    @property
    def everything(self) -> Bool[Tensor, " n"]:
        """All blocks."""
        return torch.ones_like(self.sizes, dtype=torch.bool)

    def count(self, what: int) -> int:
        """How many tokens are `FRESH` or `EXACT`."""
        return int((self.owner == what).sum())

    def active(self, blocks: Bool[Tensor, " n"]) -> Int[Tensor, " k"]:
        """Positions to compute: those that have no KV, and those of `blocks`."""
        chosen = torch.cat([blocks, blocks.new_tensor([False, True])])  # EXACT, FRESH: -2, -1
        return chosen[self.owner].nonzero()[:, 0]

    def sum(self, values: Float[Tensor, "*m N"]) -> Float[Tensor, "*m n"]:
        """Of every block, the sum of its tokens' values."""
        ours = (self.owner >= 0).nonzero()[:, 0]
        out = values.new_zeros(*values.shape[:-1], len(self.sizes))
        return out.index_add_(-1, self.owner[ours], values[..., ours])


def plan(segments: Segments, exact: int, device: torch.device) -> Reuse:
    """How a prompt is reused whose chunks are all stored and whose first `exact` tokens are, too.

    The chunk right behind the prefix is where it was computed, so it needs no repair.
    """
    owner = torch.full((len(segments.tokens),), FRESH)
    owner[:exact] = EXACT
    rows: list[tuple[int, int, int]] = []
    for number, (start, stop) in enumerate(segments.spans):
        if start == len(segments.prefix):
            owner[start:stop] = EXACT
            continue
        first = max(start, exact)
        for at in range(first, stop, BLOCK_TOKENS):
            end = min(at + BLOCK_TOKENS, stop)
            owner[at:end] = len(rows)
            rows.append((number, (at - start) // BLOCK_TOKENS, end - at))
    table = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 3)
    return Reuse(owner.to(device), *table.unbind(1))
