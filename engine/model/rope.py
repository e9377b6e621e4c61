"""The exit gate of keys: rotary position embedding, applied when a key leaves for attention."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.kernels.rotate import rotate_native, rotate_torch, serves


class RopeTable(NamedTuple):
    """Cosines and sines of the angles of T positions, times the model's attention scaling."""

    cos: Float[Tensor, "T half"]
    sin: Float[Tensor, "T half"]


RUN_TOKENS = 4096  # turned at once where that needs tables of its own: fp32, and in float64 before


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

    def inverse(self, table: RopeTable) -> RopeTable:
        """What takes a rotation by `table` back, its scaling too."""
        factor = self.scaling**-2
        return RopeTable(table.cos * factor, table.sin * -factor)

    def unrotate(self, x: Float[Tensor, "H T D"], start: int) -> Float[Tensor, "H T D"]:
        """What was rotated to positions from `start` on, as it was: to a rounding of its dtype."""
        out = torch.empty_like(x)
        for at in range(0, x.shape[1], RUN_TOKENS):
            part = slice(at, min(at + RUN_TOKENS, x.shape[1]))
            positions = torch.arange(start + part.start, start + part.stop, device=x.device)
            out[:, part] = self.rotate(x[:, part], self.inverse(self.table(positions)))
        return out

    def rotate(self, x: Float[Tensor, "H T D"], table: RopeTable) -> Float[Tensor, "H T D"]:
        """Rotate token t of every head by row t of `table`; in float32, rounded once."""
        turn = rotate_native if x.dim() == 3 and serves(x, table.cos) else rotate_torch
        return turn(x, *table, interleaved=self.interleaved)

    def place(
        self, x: Float[Tensor, "H B P D"], table: RopeTable, out: Float[Tensor, "H T D"]
    ) -> None:
        """Rotate B runs of P tokens to where they follow each other, T in all."""
        fits = out.shape == (len(x), len(table.cos), x.shape[-1]) and out.is_cpu
        if fits and serves(x, table.cos) and out.dtype == x.dtype and out.stride(-1) == 1:
            rotate_native(x, *table, interleaved=self.interleaved, out=out)
        else:
            out.copy_(rotate_torch(x.flatten(1, 2), *table, interleaved=self.interleaved))


class FarTable:
    """Tables of any positions below `length`, from two small ones: R(a + b) = R(a) R(b).

    For rows rebuilt at every step, which would need thousands of angles in float64. A table of all
    positions of 128k tokens takes 64 MiB at 128 dimensions, these two 0.4.
    """

    STEP = 512

    def __init__(self, rope: Rope, length: int) -> None:
        device = rope.inv_freq.device
        self.near = rope.table(torch.arange(self.STEP, device=device))
        far = torch.arange(0, max(1, length), self.STEP, device=device)
        cos, sin = rope.table(far)
        self.far = RopeTable(cos / rope.scaling, sin / rope.scaling)  # the scaling counts once

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.near, *self.far))

    def table(self, positions: Int[Tensor, " T"]) -> RopeTable:
        """What `Rope.rotate` needs to place tokens at `positions`."""
        a = [x.index_select(0, positions // self.STEP) for x in self.far]
        b = [x.index_select(0, positions % self.STEP) for x in self.near]
        return RopeTable(a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1])


class Tables(dict[Rope, RopeTable]):
    """Rotation tables of some positions, made once per distinct rope, not once per layer."""

    def __init__(self, positions: Int[Tensor, " T"]) -> None:
        super().__init__()
        self._positions = positions

    def __missing__(self, rope: Rope) -> RopeTable:
        self[rope] = rope.table(self._positions)
        return self[rope]
