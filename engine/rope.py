"""The exit gate of keys: rotary position embedding, applied when a key leaves for attention."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class RopeTable(NamedTuple):
    """Cosines and sines of the angles of T positions, times the model's attention scaling."""

    cos: Float[Tensor, "T half"]
    sin: Float[Tensor, "T half"]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotation by the model's own frequencies, with our angles (RoFormer, Su et al. 2021).

    Angles are taken in float64: in float32 they are off by 0.005 rad at 100,000 tokens.

    Args:
        inv_freq: float64, from the model's rotary module; covers the first 2·half of D dims.
        scaling: factor on cos and sin (YaRN's attention factor; 1 elsewhere).
        interleaved: pairs are (0, 1), (2, 3)... (GLM), not (0, half), (1, half + 1)...
        max_positions: beyond it the model's frequencies would change (dynamic NTK, longrope);
            None where they are fixed.
    """

    inv_freq: Float[Tensor, " half"]
    scaling: float = 1.0
    interleaved: bool = False
    max_positions: int | None = None

    def table(self, positions: Int[Tensor, " T"]) -> RopeTable:
        """What `rotate` needs to place tokens at `positions`; float32."""
        angle = positions.double()[:, None] * self.inv_freq
        return RopeTable((angle.cos() * self.scaling).float(), (angle.sin() * self.scaling).float())

    def rotate(self, x: Float[Tensor, "H T D"], table: RopeTable) -> Float[Tensor, "H T D"]:
        """Rotate token t of every head by row t of `table`; in float32, rounded once."""
        half = len(self.inv_freq)
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned[..., :half], turned[..., half:]
        parts = a * table.cos - b * table.sin, b * table.cos + a * table.sin
        turned = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)


class Tables(dict[Rope, RopeTable]):
    """Rotation tables of some positions, made once per distinct rope, not once per layer."""

    def __init__(self, positions: Int[Tensor, " T"]) -> None:
        super().__init__()
        self._positions = positions

    def __missing__(self, rope: Rope) -> RopeTable:
        self[rope] = rope.table(self._positions)
        return self[rope]
