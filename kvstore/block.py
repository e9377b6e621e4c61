"""Blocks of KV and the content hashes that name them."""

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from kvstore.identity import ModelIdentity


class Kind(IntEnum):
    """What a block's KV may be used for. It is part of the key."""

    EXACT = (
        1  # KV of a prefix, as a prefill computes it: the only kind that answers a prefix lookup
    )
    CHUNK = 2  # a chunk computed alone, behind a warm-up prefix
    REPAIRED = 3  # a chunk after its spoilt tokens were recomputed in some context


class Precision(IntEnum):
    """Through which lossy codec the KV of a chain may have passed. It is part of the key.

    So exact and lossy KV never meet, and neither does what is computed on top of them.
    """

    EXACT = 0
    FP8 = 1
    INT8 = 2
    K8V4 = 3
    INT4 = 4

    def takes(self, precision: "Precision") -> bool:
        """Whether KV written with `precision` may answer for this one."""
        return precision in (Precision.EXACT, self)


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Names one block by everything its KV depends on: tenant, model, tokens before it, its own.

    Two keys are equal if their digests are; the other fields say what the digest was made of, and
    a record must agree with them when it is read.
    """

    digest: bytes  # 32
    parent: bytes | None = field(compare=False)  # digest of the block before it in its chain
    identity: bytes = field(compare=False)  # digest of the ModelIdentity, 32
    token_digest: bytes = field(compare=False)  # of the block's own tokens, 16
    num_tokens: int = field(compare=False)
    kind: Kind = field(compare=False)
    depth: int = field(compare=False)  # index in its chain
    tenant: bytes = field(default=bytes(8), compare=False)  # see `tenant_tag`, 8
    precision: Precision = field(default=Precision.EXACT, compare=False)
    # the tenant's part of what seals its blocks elsewhere; stored nowhere, so b"" if read back
    seal_key: bytes = field(default=b"", compare=False, repr=False)

    @classmethod
    def chain(
        cls,
        tokens: Sequence[int],
        *,
        identity: ModelIdentity,
        tenant: bytes,
        size: int,
        kind: Kind = Kind.EXACT,
        warmup: bytes = b"",
        precision: Precision = Precision.EXACT,
    ) -> list["BlockKey"]:
        """Keys of the blocks of `tokens`; block i names the tokens 0..(i+1)*size.

        The ragged tail of a prompt (EXACT) has no key; that of a chunk has one, over its length.

        Args:
            tenant: secret of the namespace: without it nobody can guess a key.
            size: tokens per block.
            warmup: digest of the prefix a chunk was computed behind; empty for EXACT.
            precision: what these blocks, or those that they were computed on, may have lost.
        Raises:
            ValueError: for a size below one, a token that is no uint32, or a warm-up of EXACT.
        """
        if size < 1 or (warmup and kind is Kind.EXACT):
            raise ValueError(f"need size >= 1 and no warm-up for EXACT, got {size=}, {warmup=}")
        ids = _token_ids(tokens)
        secret = _secret(tenant)
        tag = tenant_tag(tenant)
        seal_key = hmac.digest(secret, b"headrace seal 1", "sha256")
        head = _head(identity.digest, size, kind, precision, warmup)
        end = len(ids) if kind is not Kind.EXACT else len(ids) // size * size
        keys: list[BlockKey] = []
        parent = None
        for depth, start in enumerate(range(0, end, size)):
            own = ids[start : start + size].tobytes()
            digest = hmac.digest(secret, head + _link(parent, len(own) // 4) + own, "sha256")
            digest16, count = sha256(own).digest()[:16], len(own) // 4
            own_fields = digest16, count, kind, depth, tag, precision, seal_key
            keys.append(cls(digest, parent, identity.digest, *own_fields))
            parent = digest
        return keys


def tenant_tag(tenant: bytes) -> bytes:
    """Eight bytes that all blocks of a tenant carry, so that a store can count what is whose.

    From the tag alone the secret can only be guessed, as from the digests; two tenants have
    different ones.
    """
    return hmac.digest(_secret(tenant), b"headrace tenant tag 1", "sha256")[:8]


class LayerKV(NamedTuple):
    """KV of one block in one layer. Keys are unrotated, so the tokens have no position yet."""

    k: Float[Tensor, "Hk P D"]
    v: Float[Tensor, "Hk P D"]


@dataclass(frozen=True, slots=True)
class KVBlock:
    """KV of one block, all layers: written whole, read a few layers at a time.

    The tensor belongs to the block: whoever makes one must not write to it afterwards.
    """

    data: Float[Tensor, "L 2 Hk P D"]  # K then V in each layer; contiguous, on the CPU

    def __post_init__(self) -> None:
        data = self.data
        if data.requires_grad:
            raise ValueError("a block has no gradient: call .detach() on its tensor")
        if data.ndim != 5 or data.shape[1] != 2 or data.device.type != "cpu":
            raise ValueError(f"need [L, 2, Hk, P, D] on the CPU, got {data.shape} on {data.device}")
        if not data.is_contiguous():
            raise ValueError("a block must be contiguous: call .contiguous() on its tensor")

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def _secret(tenant: bytes) -> bytes:
    return sha256(b"headrace tenant 1" + tenant).digest()  # HMAC pads keys: b"a" == b"a\0"


def _token_ids(tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    wide = np.asarray(tokens if len(tokens) else np.empty(0, np.int64))
    if wide.ndim != 1 or wide.dtype.kind not in "iu" or (wide < 0).any() or (wide >> 32).any():
        raise ValueError(f"tokens must be integers from 0 to 2**32 - 1, got {wide.dtype} {wide}")
    return wide.astype("<u4")


def _head(identity: bytes, size: int, kind: Kind, precision: Precision, warmup: bytes) -> bytes:
    """What all keys of a chain share. Every field has a fixed length or its length before it."""
    fields = struct.pack("<32sBII", identity, kind, size, len(warmup)) + warmup
    if precision is Precision.EXACT:
        return b"headrace block 1" + fields
    return b"headrace lossy 1" + struct.pack("<B", precision) + fields


def _link(parent: bytes | None, count: int) -> bytes:
    return struct.pack("<B32sI", parent is not None, parent or b"", count)
