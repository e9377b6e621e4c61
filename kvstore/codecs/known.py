"""All codecs, by their numbers and their names."""

from collections.abc import Mapping
from typing import Literal

import torch

from kvstore.block import BlockKey, Precision
from kvstore.codecs.codec import Codec
from kvstore.codecs.lossless import Lossless
from kvstore.codecs.parts import Channels, Heads, Smoothed
from kvstore.codecs.quantized import Quantized
from kvstore.codecs.raw import Raw
from kvstore.rows import Int4

CodecName = Literal["raw", "lossless", "fp8", "int8", "k8v4", "int4"]

FOUR_BITS = Smoothed(Int4(group=64))
RAW, LOSSLESS = Raw(), Lossless()
LOSSY: Mapping[Precision, Codec] = {
    codec.precision: codec
    for codec in (
        Quantized(3, Precision.FP8, Heads(), Heads()),
        Quantized(4, Precision.INT8, Channels(), Channels()),
        Quantized(5, Precision.K8V4, Channels(), FOUR_BITS),
        Quantized(6, Precision.INT4, FOUR_BITS, FOUR_BITS),
    )
}
_ALL: tuple[Codec, ...] = (RAW, LOSSLESS, *LOSSY.values())
CODECS: Mapping[int, Codec] = {codec.code: codec for codec in _ALL}
BY_NAME: Mapping[str, Codec] = {codec.name: codec for codec in CODECS.values()}


def exact_codec(name: CodecName) -> Codec:
    """What exact blocks are written by where `name` is set: by itself, or losslessly."""
    codec = BY_NAME[name]
    return codec if codec.precision is Precision.EXACT else LOSSLESS


def codec_for(key: BlockKey, exact: Codec, shape: torch.Size, dtype: torch.dtype) -> Codec:
    """What to write a block of `shape` by, if its numbers allow.

    Args:
        exact: for exact blocks.
    """
    if key.precision is Precision.EXACT:
        return exact
    codec = LOSSY[key.precision]
    raw_bytes = RAW.payload_bytes(shape, dtype)
    return codec if codec.payload_bytes(shape, dtype) < raw_bytes else LOSSLESS
