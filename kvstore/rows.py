"""How K and V of one token of one KV head become a row of bytes, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Complex128, Float, UInt8
from torch import Tensor

ROW_ALIGN = 16  # bytes: rows are copied as whole words, and start where a register's load likes it
PART_ALIGN = 4  # bytes: of the fp32 scale in a row
_LEAST_STEP = 2.0**-24  # the smallest fp16


class TokenKV(NamedTuple):
    """K and V of some tokens of one layer, rotated or not as they were written.

    Views of rows: the last dimension is dense, the others may not be.
    """

    k: Float[Tensor, "Hk K D"] | None  # None where keys are not in the rows
    v: Float[Tensor, "Hk K D"]


@runtime_checkable
class RowCodec(Protocol):
    """Encodes the last dimension; every row has the same size and stands alone.

    decode: needs `head_dim`, since two of them may give rows of one size.
    """

    @property
    def name(self) -> str: ...
    def row_bytes(self, head_dim: int) -> int: ...
    def encode(self, x: Float[Tensor, "*n D"]) -> UInt8[Tensor, "*n row"]: ...
    def decode(
        self, rows: UInt8[Tensor, "*n row"], head_dim: int, dtype: torch.dtype
    ) -> Float[Tensor, "*n D"]: ...


@dataclass(frozen=True, slots=True)
class Raw:
    """The numbers themselves: exact for tensors of this dtype."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def row_bytes(self, head_dim: int) -> int:
        return head_dim * self.dtype.itemsize

    def encode(self, x: Float[Tensor, "*n D"]) -> UInt8[Tensor, "*n row"]:
        return x.to(self.dtype).contiguous().view(torch.uint8)

    def decode(
        self, rows: UInt8[Tensor, "*n row"], head_dim: int, dtype: torch.dtype
    ) -> Float[Tensor, "*n D"]:
        return rows.view(self.dtype).to(dtype)


@dataclass(frozen=True, slots=True)
class Int8:
    """One symmetric scale a row: at most half a step off, a step being the largest value / 127.

    [ D codes, int8 | to a multiple of 4 | scale, fp32 ]; fp16 would save nothing: rows are padded.
    """

    @property
    def name(self) -> str:
        return "int8"

    def row_bytes(self, head_dim: int) -> int:
        return aligned(head_dim, PART_ALIGN) + 4

    def encode(self, x: Float[Tensor, "*n D"]) -> UInt8[Tensor, "*n row"]:
        wide = x.float()
        scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(wide.dtype).tiny)
        codes = (wide / scale).round_().to(torch.int8).view(torch.uint8)
        gap = codes.new_zeros(*x.shape[:-1], -x.shape[-1] % PART_ALIGN)
        return torch.cat([codes, gap, scale.view(torch.uint8)], -1)

    def decode(
        self, rows: UInt8[Tensor, "*n row"], head_dim: int, dtype: torch.dtype
    ) -> Float[Tensor, "*n D"]:
        scale = rows[..., aligned(head_dim, PART_ALIGN) :].view(torch.float32)
        return (rows[..., :head_dim].view(torch.int8) * scale).to(dtype)


@dataclass(frozen=True, slots=True)
class Int4:
    """Scale and smallest value for every `group` numbers: at most half a step off.

    A step is the group's range / 15; fp16 rounds the smallest value, exactly for bf16 inputs.
    The last group may be smaller. For magnitudes up to 3e4.

        [ codes, byte i: number i low, number i + half high | to even | (scale, least) fp16 ... ]
    """

    group: int = 32

    @property
    def name(self) -> str:
        return "int4"

    def row_bytes(self, head_dim: int) -> int:
        return self.scales_at(head_dim) + 4 * -(-head_dim // self.group)

    def scales_at(self, head_dim: int) -> int:
        """Where in a row the scales begin."""
        return aligned(-(-head_dim // 2), 2)

    def encode(self, x: Float[Tensor, "*n D"]) -> UInt8[Tensor, "*n row"]:
        dim = x.shape[-1]
        wide = _longer(x.float(), -dim % self.group).unflatten(-1, (-1, self.group))
        least = _fp16(wide.amin(-1, keepdim=True))
        scale = _fp16((wide.amax(-1, keepdim=True) - least.float()) / 15).clamp_min(_LEAST_STEP)
        codes = ((wide - least.float()) / scale.float()).round_().clamp_(0, 15)
        bytes_ = _nibbles(codes.flatten(-2)[..., :dim].to(torch.uint8))
        scales = torch.cat([scale, least], -1).flatten(-2).view(torch.uint8)
        gap = bytes_.new_zeros(*x.shape[:-1], bytes_.shape[-1] % 2)
        return torch.cat([bytes_, gap, scales], -1)

    def decode(
        self, rows: UInt8[Tensor, "*n row"], head_dim: int, dtype: torch.dtype
    ) -> Float[Tensor, "*n D"]:
        packed = rows[..., : -(-head_dim // 2)]
        codes = torch.cat([packed & 15, packed >> 4], -1)[..., :head_dim]
        whole = torch.nn.functional.pad(codes, (0, -head_dim % self.group))
        groups = whole.unflatten(-1, (-1, self.group)).float()
        scales = rows[..., self.scales_at(head_dim) :].view(torch.float16).float()
        scale, least = scales.unflatten(-1, (-1, 2))[..., None].unbind(-2)
        return groups.mul_(scale).add_(least).flatten(-2)[..., :head_dim].to(dtype)


CODECS: Mapping[str, Callable[[], RowCodec]] = {
    "bfloat16": lambda: Raw(torch.bfloat16),
    "float16": lambda: Raw(torch.float16),
    "float32": lambda: Raw(torch.float32),
    "int8": Int8,
    "int4": Int4,
}


def row_codec(name: str) -> RowCodec:
    """The codec of that name. Raises ValueError, with the names there are."""
    if name not in CODECS:
        raise ValueError(f"no row codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]()


@dataclass(frozen=True, slots=True)
class RowLayout:
    """K and V of one token and head side by side, so that both are one contiguous read.

        [ K from k_at | to a multiple of 4 | V from v_at | to a multiple of 16 ]  row_bytes

    Args:
        k: None where keys are rebuilt from elsewhere (low rank) and a row holds V alone.
        dtype: of what `decode` returns.
    """

    k: RowCodec | None
    v: RowCodec
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be positive, got {self.head_dim}")

    @property
    def k_at(self) -> int:
        return 0

    @property
    def v_at(self) -> int:
        return 0 if self.k is None else aligned(self.k.row_bytes(self.head_dim), PART_ALIGN)

    @property
    def row_bytes(self) -> int:
        return aligned(self.v_at + self.v.row_bytes(self.head_dim), ROW_ALIGN)

    def encode(
        self, k: Float[Tensor, "Hk N D"] | None, v: Float[Tensor, "Hk N D"]
    ) -> UInt8[Tensor, "Hk N row"]:
        """Rows of N tokens; `k` is ignored where rows hold none. Raises ValueError if it lacks."""
        rows = torch.empty(*v.shape[:-1], self.row_bytes, dtype=torch.uint8, device=v.device)
        behind_k = 0
        if self.k is not None:
            if k is None:
                raise ValueError(f"rows hold keys ({self.k.name}), and none were given")
            behind_k = self.k.row_bytes(self.head_dim)
            rows[..., :behind_k] = self.k.encode(k)
        behind_v = self.v_at + self.v.row_bytes(self.head_dim)
        rows[..., self.v_at : behind_v] = self.v.encode(v)
        rows[..., behind_k : self.v_at] = 0  # never what lay in memory: rows may go to disk
        rows[..., behind_v:] = 0
        return rows

    def decode(self, rows: UInt8[Tensor, "Hk K row"]) -> TokenKV:
        """K and V of rows; where a codec's numbers are of `dtype` already, views of them."""
        k = None if self.k is None else self._part(self.k, rows, self.k_at)
        return TokenKV(k, self._part(self.v, rows, self.v_at))

    def _part(self, codec: RowCodec, rows: Tensor, at: int) -> Float[Tensor, "Hk K D"]:
        size = codec.row_bytes(self.head_dim)
        return codec.decode(rows[..., at : at + size], self.head_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What a pool holds. Raises ValueError unless `block_tokens` is a power of two."""

    num_layers: int
    num_kv_heads: int
    layout: RowLayout
    block_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads) < 1:
            raise ValueError(f"need layers and heads: {self.num_layers}, {self.num_kv_heads}")
        if self.block_tokens < 1 or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"block_tokens must be a power of two, got {self.block_tokens}")

    @property
    def layer_bytes(self) -> int:
        """Of one block in one layer."""
        return self.num_kv_heads * self.block_tokens * self.layout.row_bytes

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self.num_layers * self.layer_bytes


def words(rows: UInt8[Tensor, "n row"]) -> Complex128[Tensor, "n words"]:
    """The same memory in words of 16 bytes, the widest that torch moves without looking at them.

    To write 16,384 rows of 512 B takes 0.9 ms, with words of 8 bytes 1.6, of one byte 9.2; to
    read them 0.7, 0.8 and 1.2 where they are in a cache.
    """
    return rows.view(torch.complex128)


def aligned(nbytes: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-nbytes // to) * to


def _longer(x: Float[Tensor, "*n D"], count: int) -> Float[Tensor, "*n D2"]:
    """With its last number repeated, which widens no group's range."""
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], count)], -1) if count else x


def _fp16(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).to(torch.float16)


def _nibbles(codes: UInt8[Tensor, "*n D"]) -> UInt8[Tensor, "*n half"]:
    """Two codes a byte: the first half of them low, the second high."""
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], codes[..., half:]
    return low | torch.nn.functional.pad(high << 4, (0, half - high.shape[-1]))
