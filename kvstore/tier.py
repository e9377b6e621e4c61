"""One place where blocks rest."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.known import RAW
from kvstore.errors import TierFull
from kvstore.quotas import Lack, Limits
from kvstore.tally import Group, Groups, change, of_tenants

Item = tuple[BlockKey, KVBlock]


class Resident(NamedTuple):
    """A block in a tier, as a policy sees it."""

    digest: bytes
    parent: bytes | None
    nbytes: int
    depth: int  # index in its chain
    tenant: bytes  # see `BlockKey`


@runtime_checkable
class Tier(Protocol):
    """A mapping from keys to blocks with a byte budget, and no policy. Thread-safe.

    put: all of the blocks or none. Present keys are left alone. Deletes `victims`, in that order,
        only as far as the rest needs the room, or their tenant that of its limit, in bytes by
        tenant; returns those that went. What is durable is so when it returns. Raises TierFull,
        naming the setting, if they do not fit.
    get, read: None if absent, or if there is any doubt about the bytes. Read-only: the tensor may
        be the tier's own. With `out`, they are copied there, and None leaves `out` undefined.
    read_many: as read for each key, into the rows of `out`; False leaves its row undefined.
    delete: blocks with all that the tier knows to rest on them, whose digests it returns; unknown
        keys are fine.
    cost: what a block takes here, at most.
    sizes: what present blocks take; 0 for absent ones.
    held: which of the keys are present. Reads no data. `in` also takes a digest alone.
    residents: least recently used first.
    groups: how much of the budget belongs to whom; sums to `used_bytes`.
    news: whether blocks came or went without `put` and `delete` since that was asked last.
    touched: uses of blocks, least recent first, for `residents` of a later opening.
    """

    name: str
    setting: str  # of the budget
    durable: bool  # put waits for a device
    capacity_bytes: int

    @property
    def corrupt(self) -> int: ...  # records found damaged
    @property
    def quarantined(self) -> int: ...  # blocks no longer served, and not yet deleted
    @property
    def used_bytes(self) -> int: ...
    def cost(self, key: BlockKey, block: KVBlock) -> int: ...
    def sizes(self, digests: Sequence[bytes]) -> list[int]: ...
    def put(
        self, blocks: Sequence[Item], victims: Iterable[bytes] = (), limits: Limits | None = None
    ) -> list[bytes]: ...
    def get(self, key: BlockKey) -> KVBlock | None: ...
    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None: ...
    def read_many(
        self, keys: Sequence[BlockKey], layers: range, out: Float[Tensor, "B n 2 Hk P D"]
    ) -> list[bool]: ...
    def delete(self, keys: Sequence[BlockKey | bytes]) -> list[bytes]: ...
    def held(self, keys: Sequence[BlockKey]) -> list[bool]: ...
    def touched(self, digests: Sequence[bytes]) -> None: ...
    def residents(self) -> Iterator[Resident]: ...
    def groups(self) -> Groups: ...
    def news(self) -> bool: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...
    def __contains__(self, key: BlockKey | bytes | None) -> bool: ...


class HostTier:
    """Blocks in host memory. Reads are views of the stored tensors."""

    name = "host"
    setting = "host_bytes"
    durable = False
    corrupt = 0
    quarantined = 0

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._blocks: dict[bytes, Item] = {}
        self._used: dict[bytes, None] = {}  # the same, least recently used first
        self._groups: Groups = {}
        self._lock = threading.Lock()

    def cost(self, key: BlockKey, block: KVBlock) -> int:
        return block.nbytes

    def sizes(self, digests: Sequence[bytes]) -> list[int]:
        with self._lock:
            found = [self._blocks.get(digest) for digest in digests]
        return [0 if item is None else item[1].nbytes for item in found]

    def put(
        self, blocks: Sequence[Item], victims: Iterable[bytes] = (), limits: Limits | None = None
    ) -> list[bytes]:
        with self._lock:
            fresh = {k.digest: (k, b) for k, b in blocks if k.digest not in self._blocks}
            needs = needed(fresh.values(), self)
            excess = self.used_bytes + needs.total() - self.capacity_bytes
            lack = Lack(excess, of_tenants(self._groups), needs, limits or {})
            going = self._make_room(lack, victims)
            for digest in going:
                self._drop(digest)
            self._blocks |= fresh
            self._used |= dict.fromkeys(fresh)
            self.used_bytes += needs.total()
            for key, block in fresh.values():
                change(self._groups, _group(key), block.nbytes, 1)
            return going

    def get(self, key: BlockKey) -> KVBlock | None:
        item = self._blocks.get(key.digest)
        return None if item is None else item[1]

    def find(self, digest: bytes) -> Item | None:
        return self._blocks.get(digest)

    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None:
        block = self.get(key)
        if block is None:
            return None
        check_layers(layers, len(block.data))
        data = block.data[layers.start : layers.stop]
        return data if out is None else checked_out(out, data.shape, data.dtype).copy_(data)

    def read_many(
        self, keys: Sequence[BlockKey], layers: range, out: Float[Tensor, "B n 2 Hk P D"]
    ) -> list[bool]:
        pairs = zip(keys, out, strict=True)
        return [self.read(key, layers, row) is not None for key, row in pairs]

    def delete(self, keys: Sequence[BlockKey | bytes]) -> list[bytes]:
        digests = [key if isinstance(key, bytes) else key.digest for key in keys]
        with self._lock:
            for digest in digests:
                self._drop(digest)
        return digests

    def held(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [key.digest in self._blocks for key in keys]

    def touched(self, digests: Sequence[bytes]) -> None:
        with self._lock:
            for digest in digests:
                if digest in self._used:
                    del self._used[digest]
                    self._used[digest] = None

    def residents(self) -> Iterator[Resident]:
        with self._lock:
            items = [self._blocks[digest] for digest in self._used]
        return (Resident(k.digest, k.parent, b.nbytes, k.depth, k.tenant) for k, b in items)

    def groups(self) -> Groups:
        with self._lock:
            return dict(self._groups)

    def news(self) -> bool:
        return False

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._used.clear()
            self._groups.clear()
            self.used_bytes = 0

    def close(self) -> None:
        self.clear()

    def __contains__(self, key: BlockKey | bytes | None) -> bool:
        return (key.digest if isinstance(key, BlockKey) else key) in self._blocks

    def _make_room(self, lack: Lack, victims: Iterable[bytes]) -> list[bytes]:
        """Those of the victims that must go; nothing is dropped yet."""
        going: list[bytes] = []
        for digest in victims:
            if not lack:
                break
            item = self._blocks.get(digest)
            if item is not None and lack.of(item[0].tenant):
                going.append(digest)
                lack.gone(item[0].tenant, item[1].nbytes)
        if lack:
            raise full(self, lack)
        return going

    def _drop(self, digest: bytes) -> None:
        if item := self._blocks.pop(digest, None):
            del self._used[digest]
            self.used_bytes -= item[1].nbytes
            change(self._groups, _group(item[0]), -item[1].nbytes, -1)


def _group(key: BlockKey) -> Group:
    return Group(key.tenant, key.kind, RAW.code)


def resting_on(digests: Sequence[bytes], residents: Iterable[Resident]) -> list[bytes]:
    """Blocks, and all of the residents that rest on them."""
    rests_on: dict[bytes | None, list[bytes]] = defaultdict(list)
    for resident in residents:
        rests_on[resident.parent].append(resident.digest)
    found = list(digests)
    for digest in found:
        found += rests_on.pop(digest, ())
    return list(dict.fromkeys(found))


def check_layers(layers: range, num_layers: int) -> None:
    """Raise ValueError unless `layers` is a run of a block's layers."""
    if not 0 <= layers.start < layers.stop <= num_layers or layers.step != 1:
        raise ValueError(f"need a run of the {num_layers} layers, got {layers}")


def checked_out(out: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The caller's destination. Raises ValueError if KV of this shape cannot go there."""
    fits = out.shape == shape and out.dtype == dtype and out.device.type == "cpu"
    if not fits or out.requires_grad or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, on the CPU, without gradient, {dtype}, {list(shape)}; got "
            f"{out.dtype}, {list(out.shape)}, on {out.device}"
        )
    return out


def needed(blocks: Iterable[Item], tier: Tier) -> Counter[bytes]:
    """What blocks take of a tier's budget, by tenant."""
    needs: Counter[bytes] = Counter()
    for key, block in blocks:
        needs[key.tenant] += tier.cost(key, block)
    return needs


def full(tier: Tier, lack: Lack) -> TierFull:
    """The error of a tier, or of a tenant, without room."""
    if lack.excess > 0:
        return TierFull(
            f"{tier.name} tier full: {lack.excess} bytes more needed, {tier.used_bytes} used of "
            f"{tier.capacity_bytes}, and nothing more may be evicted; raise {tier.setting}"
        )
    return TierFull(
        f"a tenant's quota in the {tier.name} tier is full: {max(lack.over.values())} bytes more "
        "needed, and nothing more of it may be evicted; raise tenant_quota_bytes"
    )
