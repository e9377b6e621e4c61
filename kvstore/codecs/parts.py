"""How K or V of a layer becomes a fixed number of bytes, with a small error.

Written for any number of layers at a time, as tensor code without a loop, for any device. Where
numbers cannot be encoded (infinite or almost, or not numbers), `encode` gives None.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from kvstore.rows import RowCodec

_LARGEST_FP8 = 448.0  # of e4m3
_TINY = torch.finfo(torch.bfloat16).tiny


@runtime_checkable
class Part(Protocol):
    """`nbytes` are of one layer, and a multiple of 4, so that numbers in them are aligned."""

    def nbytes(self, heads: int, tokens: int, dim: int) -> int: ...
    def encode(self, x: Float[Tensor, "*n Hk P D"]) -> UInt8[Tensor, "*n N"] | None: ...
    def decode(self, data: UInt8[Tensor, "*n N"], out: Float[Tensor, "*n Hk P D"]) -> None: ...


class Spread(NamedTuple):
    """Where the numbers of each channel lie: middle ± half."""

    middle: Float[Tensor, "*n Hk 1 D"]  # as rounded to bf16
    half: Float[Tensor, "*n Hk 1 D"]


@dataclass(frozen=True, slots=True)
class Channels:
    """8 bits a number; each channel of a head has a middle and a step, over the block's tokens.

    Per channel, since the channels of K differ in size and in their mean. On KV of the reference
    model K is 0.23 % off so, with a step alone 0.42, and with a step per token 0.67; V 0.45 and,
    with a step per token, 0.64.

        [ middle, step: bf16, of every channel | codes, int8 | to a multiple of 4 ]
    """

    def nbytes(self, heads: int, tokens: int, dim: int) -> int:
        return 4 * heads * dim + _whole(heads * tokens * dim)

    def encode(self, x: Float[Tensor, "*n Hk P D"]) -> UInt8[Tensor, "*n N"] | None:
        wide = x.float()
        middle, half = _spread(wide)
        if not _small(middle.abs() + half, x.dtype):
            return None
        step = _rounded(half / 127)
        codes = ((wide - middle) / step).round_().to(torch.int8)
        return _joined(_pairs(middle, step), codes)

    def decode(self, data: UInt8[Tensor, "*n N"], out: Float[Tensor, "*n Hk P D"]) -> None:
        (middle, step), rest = _split(data, out.shape)
        codes = rest[..., : out.shape[-3:].numel()].view(torch.int8).unflatten(-1, out.shape[-3:])
        out.copy_((codes * step).add_(middle))


@dataclass(frozen=True, slots=True)
class Heads:
    """e4m3, one scale for each head of the block.

    A finer scale is not worth its bytes: a floating format is as precise over 15 octaves. With one
    per token the error is 2.5 % for 2.7, of which the mantissa's 3 bits are to blame.

        [ scale, fp32, of every head | codes | to a multiple of 4 ]
    """

    def nbytes(self, heads: int, tokens: int, dim: int) -> int:
        return 4 * heads + _whole(heads * tokens * dim)

    def encode(self, x: Float[Tensor, "*n Hk P D"]) -> UInt8[Tensor, "*n N"] | None:
        wide = x.float()
        largest = wide.abs().amax((-2, -1), keepdim=True)
        if not _small(largest, x.dtype):
            return None
        scale = (largest / _LARGEST_FP8).clamp_min(_TINY)
        return _joined(_bytes(scale), (wide / scale).to(torch.float8_e4m3fn))

    def decode(self, data: UInt8[Tensor, "*n N"], out: Float[Tensor, "*n Hk P D"]) -> None:
        heads = out.shape[-3]
        scale = data[..., : 4 * heads].view(torch.float32)[..., None, None]
        codes = data[..., 4 * heads :][..., : out.shape[-3:].numel()].view(torch.float8_e4m3fn)
        out.copy_(codes.unflatten(-1, out.shape[-3:]).float().mul_(scale))


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Rows of few bits, of channels that were made alike: moved to 0 ± 1, and back by `decode`.

    What shares a step in a row then has about one size (SmoothAttention of QServe, Lin et al. 2024,
    which leaves the factors to the queries, and moves nothing).

        [ middle, half: bf16, of every channel | a row per head and token | to a multiple of 4 ]
    """

    row: RowCodec

    def nbytes(self, heads: int, tokens: int, dim: int) -> int:
        return 4 * heads * dim + _whole(heads * tokens * self.row.row_bytes(dim))

    def encode(self, x: Float[Tensor, "*n Hk P D"]) -> UInt8[Tensor, "*n N"] | None:
        wide = x.float()
        middle, half = _spread(wide)
        if not _small(middle.abs() + half, x.dtype):
            return None
        half = _rounded(half)
        return _joined(_pairs(middle, half), self.row.encode((wide - middle) / half))

    def decode(self, data: UInt8[Tensor, "*n N"], out: Float[Tensor, "*n Hk P D"]) -> None:
        (middle, half), rest = _split(data, out.shape)
        *_, heads, tokens, dim = out.shape
        shape = (heads, tokens, self.row.row_bytes(dim))
        rows = rest[..., : torch.Size(shape).numel()].unflatten(-1, shape)
        out.copy_(self.row.decode(rows, dim, torch.float32).mul_(half).add_(middle))


def _spread(x: Float[Tensor, "*n Hk P D"]) -> Spread:
    least, most = x.aminmax(dim=-2, keepdim=True)
    middle = ((least + most) / 2).bfloat16().float()
    return Spread(middle, torch.maximum(most - middle, middle - least))


def _small(largest: Float[Tensor, "*n"], dtype: torch.dtype) -> bool:
    """Whether these are numbers so far from the dtype's end that no error takes them over it."""
    return bool((largest <= torch.finfo(dtype).max / 2).all())


def _rounded(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """To a number of bf16 by which one can divide."""
    return x.clamp_min(_TINY).bfloat16().float()


def _pairs(a: Float[Tensor, "*n Hk 1 D"], b: Float[Tensor, "*n Hk 1 D"]) -> UInt8[Tensor, "*n N"]:
    return _bytes(torch.cat([a, b], -3).bfloat16())


def _split(
    data: UInt8[Tensor, "*n N"], shape: torch.Size
) -> tuple[tuple[Float[Tensor, "*n Hk 1 D"], Float[Tensor, "*n Hk 1 D"]], UInt8[Tensor, "*n M"]]:
    """The two numbers of every channel, and what is behind them."""
    heads, dim = shape[-3], shape[-1]
    end = 4 * heads * dim
    pairs = data[..., :end].view(torch.bfloat16).unflatten(-1, (2 * heads, 1, dim)).float()
    return (pairs[..., :heads, :, :], pairs[..., heads:, :, :]), data[..., end:]


def _joined(head: UInt8[Tensor, "*n A"], codes: Tensor) -> UInt8[Tensor, "*n N"]:
    body = _bytes(codes)
    gap = body.new_zeros(*body.shape[:-1], -body.shape[-1] % 4)
    return torch.cat([head, body, gap], -1)


def _bytes(x: Shaped[Tensor, "*n H P D"]) -> UInt8[Tensor, "*n N"]:
    return x.flatten(-3).contiguous().view(torch.uint8)


def _whole(nbytes: int) -> int:
    return -(-nbytes // 4) * 4
