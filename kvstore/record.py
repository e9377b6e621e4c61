"""One stored value: a header that says what it is, and the payload it vouches for.

    [ magic .. reserved | header checksum ][ payload                              ]
      176 bytes, little-endian               of [n layers][2][Hk][P][D], by a codec

The checksum of the payload lies in the header, and that of the header at its end, so one flipped
bit anywhere is seen. On disk each begins a page: see `kvstore.disk.values`.
"""

import struct
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from kvstore.block import BlockKey
from kvstore.codecs.codec import DTYPE_CODES, Codec, Payload, byte_view
from kvstore.codecs.known import CODECS, LOSSLESS, codec_for
from kvstore.errors import CorruptRecord

MAGIC = b"HRKV"
VERSION = 2
_HEADER = struct.Struct("<4sHBBBB2x32s32sIIIHHHxx16sQQ16s24x")
_CHECK = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECK.size


class Header(NamedTuple):
    """The fields of a record's header, in the order of its bytes."""

    magic: bytes
    version: int
    kind: int
    codec: int
    dtype: int
    precision: int  # of the key
    identity: bytes  # 32
    key: bytes  # 32
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    first_layer: int
    end_layer: int
    num_layers: int  # of the whole block
    token_digest: bytes  # 16
    payload_bytes: int
    raw_bytes: int
    checksum: bytes  # 16, xxh3-128 of the payload


def encode(
    key: BlockKey, data: Float[Tensor, "n 2 Hk P D"], layers: range, num_layers: int, codec: Codec
) -> memoryview:
    """The record of `layers` of a block, of which `data` is the KV.

    Raises:
        ValueError: the codec loses what the key keeps, or cannot encode these numbers.
    """
    payload = codec.encode(data)
    if payload is None or not key.precision.takes(codec.precision):
        raise ValueError(f"no {codec.name} KV of {data.dtype} in a block {key.precision.name}")
    shape = torch.Size((num_layers, *data.shape[1:]))
    return sealed(payload, key, layers, shape, data.dtype, codec)


def encode_as_named(
    key: BlockKey, data: Float[Tensor, "n 2 Hk P D"], layers: range, num_layers: int, exact: Codec
) -> memoryview:
    """As `encode`: by `exact` if the key is, else as that says, or losslessly if it must be."""
    codec = codec_for(key, exact, data.shape, data.dtype)
    payload = codec.encode(data)
    if payload is None:
        return encode(key, data, layers, num_layers, LOSSLESS)
    shape = torch.Size((num_layers, *data.shape[1:]))
    return sealed(payload, key, layers, shape, data.dtype, codec)


def sealed(
    payload: Payload,
    key: BlockKey,
    layers: range,
    shape: torch.Size,
    dtype: torch.dtype,
    codec: Codec,
) -> memoryview:
    """The record of `layers` of a block of `shape`, which the codec made this payload of."""
    digest = xxhash.xxh3_128_digest(payload.data)
    start = header(key, layers, shape, dtype, codec, payload.nbytes, digest)
    record = np.empty(HEADER_BYTES + payload.nbytes, np.uint8)
    record[:HEADER_BYTES] = np.frombuffer(start, np.uint8)
    record[HEADER_BYTES:] = payload
    return record.data


def decode_into(
    out: Float[Tensor, "n 2 Hk P D"],
    record: memoryview,
    key: BlockKey,
    layers: range,
    num_layers: int,
) -> None:
    """Copy the KV of `layers` out of a record into `out`, and verify the copy.

    Raises:
        CorruptRecord: if the record is not exactly what was asked for; `out` is then undefined.
    """
    found = _unpack(record)
    codec = CODECS.get(found.codec)
    if codec is None:
        raise CorruptRecord(f"unknown codec {found.codec}")
    if not key.precision.takes(codec.precision):
        raise CorruptRecord(f"{codec.name} KV in a block that is {key.precision.name}")
    payload = np.frombuffer(record, np.uint8, offset=HEADER_BYTES)
    shape = torch.Size((num_layers, *out.shape[1:]))
    wanted = expected(key, layers, shape, out.dtype, codec, payload.nbytes)
    if found._replace(checksum=b"") != wanted:
        raise CorruptRecord(_difference(found, wanted))
    landed = codec.landing(byte_view(out), out.shape, out.dtype, payload.nbytes)
    landed[:] = payload
    if xxhash.xxh3_128_digest(landed.data) != found.checksum:
        raise CorruptRecord("payload checksum does not match")
    codec.decode(landed, out)


def header(
    key: BlockKey,
    layers: range,
    shape: torch.Size,
    dtype: torch.dtype,
    codec: Codec,
    nbytes: int,
    checksum: bytes,
) -> bytes:
    """The first HEADER_BYTES that this record of `layers` of a block of `shape` must have."""
    return _pack(expected(key, layers, shape, dtype, codec, nbytes, checksum))


def expected(
    key: BlockKey,
    layers: range,
    shape: torch.Size,
    dtype: torch.dtype,
    codec: Codec,
    payload_bytes: int,
    checksum: bytes = b"",
) -> Header:
    """The header that a record of these layers of a block of `shape` must have."""
    num_layers, _, heads, tokens, dim = shape
    raw_bytes = len(layers) * 2 * heads * tokens * dim * dtype.itemsize
    return Header(
        MAGIC, VERSION, int(key.kind), codec.code, DTYPE_CODES[dtype], key.precision,
        key.identity, key.digest, heads, tokens, dim, layers.start, layers.stop, num_layers,
        key.token_digest, payload_bytes, raw_bytes, checksum,
    )  # fmt: skip


def check(start: bytes, wanted: Header) -> None:
    """Raise CorruptRecord, with the reason, unless `start` is the header `wanted`."""
    found = _unpack(memoryview(start))
    if found._replace(checksum=b"") != wanted._replace(checksum=b""):
        raise CorruptRecord(_difference(found, wanted))
    if found.checksum != wanted.checksum:
        raise CorruptRecord("payload checksum does not match")


def verify(
    record: memoryview, key: BlockKey, layers: range, shape: torch.Size, dtype: torch.dtype
) -> None:
    """Verify a record of a block of `shape` without keeping what it holds.

    Raises:
        CorruptRecord: as `decode_into` does.
    """
    out = torch.empty(len(layers), *shape[1:], dtype=dtype)
    decode_into(out, record, key, layers, shape[0])


def _pack(header: Header) -> bytes:
    packed = _HEADER.pack(*header)
    return packed + _CHECK.pack(xxhash.xxh3_64_intdigest(packed))


def _unpack(record: memoryview) -> Header:
    if len(record) < HEADER_BYTES:
        raise CorruptRecord(f"{len(record)} bytes are too few for a header")
    packed = bytes(record[: _HEADER.size])
    (check,) = _CHECK.unpack_from(record, _HEADER.size)
    if xxhash.xxh3_64_intdigest(packed) != check:
        raise CorruptRecord("header checksum does not match")
    return Header(*_HEADER.unpack(packed))


def _difference(header: Header, wanted: Header) -> str:
    pairs = zip(Header._fields[:-1], header, wanted, strict=False)
    return "; ".join(f"{name} is {is_!r}, not {want!r}" for name, is_, want in pairs if is_ != want)
