"""A tier under its policy: what goes in, what has to go for it, and what may not."""

import threading
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from kvstore.admission import AdmissionName, SecondSight
from kvstore.block import BlockKey
from kvstore.disk.audit import AuditReport, audit_tier
from kvstore.errors import DeviceFull, MissingParent, StoreError, TierFull
from kvstore.eviction import PolicyName
from kvstore.quotas import Lack, Quotas
from kvstore.ranks import Ranks
from kvstore.stats import TierStats
from kvstore.tally import of_tenants
from kvstore.tier import Item, Resident, Tier, needed, resting_on


class Level:
    """One tier of a store.

    Victims are chosen and marked as doomed in one step, under the store's lock, which pinning
    takes too. A doomed block is not found any more, so a block that was pinned and then
    found stays. Insertions are one at a time; lookups do not wait for them.
    """

    def __init__(
        self,
        tier: Tier,
        lock: threading.RLock,
        pinned: Container[bytes],
        policy: PolicyName = "lru",
        quotas: Quotas | None = None,
        admission: AdmissionName = "always",
    ) -> None:
        self.tier = tier
        self.stats = TierStats(capacity_bytes=tier.capacity_bytes)
        self._lock = lock  # guards everything below
        self._pinned = pinned
        self._quotas = Quotas() if quotas is None else quotas
        choosy = admission == "second-sight" and tier.durable
        self._admission = SecondSight(tier.capacity_bytes) if choosy else None
        self._ranks = Ranks(policy, self._quotas, tier.capacity_bytes)
        self._doomed: set[bytes] = set()
        self._inserting = threading.Lock()
        self._seed()

    @property
    def choosy(self) -> bool:
        """Whether not all that is offered comes in."""
        return self._admission is not None

    def check_fits(self, blocks: Sequence[Item]) -> None:
        """Raise TierFull for a block that is larger than the whole tier."""
        for key, block in blocks:
            if (cost := self.tier.cost(key, block)) > self.tier.capacity_bytes:
                raise TierFull(
                    f"one block takes {cost} bytes, the whole {self.tier.name} tier has "
                    f"{self.tier.capacity_bytes}; raise {self.tier.setting}"
                )

    def held(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are here to stay for now; those that were pinned before, while they are."""
        with self._lock:  # before the tier is asked: by then a doomed block may be gone, and spared
            doomed = frozenset(self._doomed)
        found = self.tier.held(keys)
        return [is_ and key.digest not in doomed for is_, key in zip(found, keys, strict=True)]

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Note a use of these blocks, given from the head of their chain on."""
        with self._lock:
            self._ranks.touch([key.digest for key in keys])
            self.tier.touched([key.digest for key in reversed(keys)])

    def looked_up(self, keys: Sequence[BlockKey], found: Sequence[bool]) -> None:
        """Note a lookup of one chain: which of its blocks, from the head on, were here.

        Args:
            found: up to the first block that no tier has, that one included.
        """
        owner, hits = (keys[0].tenant, keys[0].kind), sum(found)
        with self._lock:
            self.touch([key for key, is_ in zip(keys, found, strict=False) if is_])
            self.stats.hits += hits
            self.stats.hits_of[owner] += hits
            self.stats.misses += len(found) - hits
            self.stats.misses_of[owner] += len(found) - hits

    def insert(self, blocks: Sequence[Item], below: Container[bytes] = ()) -> int:
        """Store absent blocks, evicting as needed; how many of `blocks` are here afterwards.

        Blocks for which there is no room beside pinned ones, and those built on them, are
        skipped and counted; so are those that it refuses (see `kvstore.admission`). Raises
        StoreError if the device fails.

        Args:
            below: digests of those that are offered just because others rest on them.
        """
        with self._inserting:
            blocks = self._admitted(self._absent(blocks), below)
            if not (self._fits(blocks) or (self._renewed() and self._fits(blocks))):
                self._put_singly(blocks)
            return sum(self.tier.held([key for key, _ in blocks]))

    def room(self, pinned: Iterable[bytes], tenant: bytes) -> int:
        """Bytes that a tenant's insertions may take now: all but those of pinned blocks."""
        capacity = self.tier.capacity_bytes
        limit = self._quotas.limit(tenant, capacity)
        with self._lock:
            here = [digest for digest in pinned if digest in self._ranks]
            room = capacity - sum(map(self._ranks.nbytes, here))
            if limit is None:
                return room
            own = [digest for digest in here if self._ranks.owner(digest) == tenant]
            return min(room, limit - sum(map(self._ranks.nbytes, own)))

    def skip(self, count: int) -> None:
        """Count blocks that were not offered to the tier."""
        with self._lock:
            self.stats.skipped += count

    def delete(self, digests: Sequence[bytes], rest: Sequence[bytes] = ()) -> int:
        """Delete blocks, pinned or not, and what rests on them; how many of `digests` were here.

        Raises StoreError where the tier cannot be asked: a miss would say that they are gone.

        Args:
            rest: what rests on them in other tiers, where those between may be.
        """
        with self._inserting:
            going = list(dict.fromkeys([*digests, *rest]))
            if not self.tier.durable:  # which finds itself what rests on them
                going = resting_on(going, self.tier.residents())
            sizes = self.tier.sizes(going)
            gone = self.tier.delete(going)  # absent ones, too: their bytes may be left
            with self._lock:
                for digest in gone:
                    self._ranks.remove(digest)
            return sum(size > 0 for size in sizes[: len(set(digests))])

    def clear(self) -> None:
        with self._inserting:
            self.tier.clear()
            with self._lock:
                self._ranks.forget()
            self._seed()

    def divide(self) -> None:
        """Follow quotas, the first of which was just set."""
        with self._inserting:
            self._seed()

    def audit(self, repair: bool) -> AuditReport:
        """Audit the tier; learn anew what it holds if that may have changed."""
        with self._inserting:
            report = audit_tier(self.tier, repair)
            if repair:
                self._seed()
            return report

    def snapshot(self) -> TierStats:
        """The numbers now. A tier that cannot be asked holds what it held; lookups log why."""
        with self._lock:
            with suppress(StoreError):
                self.stats.used_bytes, self.stats.groups = self.tier.used_bytes, self.tier.groups()
            return replace(
                self.stats, blocks=len(self._ranks),
                corrupt=self.tier.corrupt, quarantined=self.tier.quarantined,
                hits_of=Counter(self.stats.hits_of), misses_of=Counter(self.stats.misses_of),
            )  # fmt: skip

    def _absent(self, blocks: Sequence[Item]) -> list[Item]:
        blocks = list({key: (key, block) for key, block in blocks}.values())
        present = self.tier.held([key for key, _ in blocks])
        return [item for item, there in zip(blocks, present, strict=True) if not there]

    def _admitted(self, blocks: Sequence[Item], below: Container[bytes]) -> Sequence[Item]:
        """Those that the tier takes in."""
        if self._admission is None or not blocks:
            return blocks
        tenants, capacity = {key.tenant for key, _ in blocks}, self.tier.capacity_bytes
        limits = self._quotas.limits(tenants, capacity)
        used = of_tenants(self.tier.groups()) if limits else {}
        left = {tenant: limit - used.get(tenant, 0) for tenant, limit in limits.items()}
        offers = [_resident(key, self.tier.cost(key, block)) for key, block in blocks]
        with self._lock:
            free = capacity - self.tier.used_bytes
            chosen = self._admission.choose(offers, free, left, self.tier.__contains__, below)
            self.stats.refused += chosen.count(False)
        return [item for item, comes in zip(blocks, chosen, strict=True) if comes]

    def _fits(self, blocks: Sequence[Item]) -> bool:
        """Store all of the blocks, or none. Raises DeviceFull."""
        try:
            self._put(blocks)
        except DeviceFull:
            raise
        except (TierFull, MissingParent):
            return False
        return True

    def _put_singly(self, blocks: Sequence[Item]) -> None:
        """As many as have room; none without those before it, which a lookup needs first."""
        skipped: set[bytes | None] = set()
        for item in blocks:
            key = item[0]
            if key.parent in skipped or not self._fits([item]):
                skipped.add(key.digest)
        with self._lock:
            self.stats.skipped += len(skipped)

    def _put(self, blocks: Sequence[Item]) -> None:
        if not blocks:
            return
        victims = self._doom(blocks)
        limits = self._quotas.limits({key.tenant for key, _ in blocks}, self.tier.capacity_bytes)
        gone: list[bytes] = []
        try:
            gone = self.tier.put(blocks, victims, limits)
        finally:
            with self._lock:
                self._doomed.difference_update(victims)
                for digest in gone:
                    if self._admission is not None:
                        self._admission.gone(digest, self._ranks.nbytes(digest))
                    self._ranks.remove(digest)
        self._note(blocks, len(gone))

    def _doom(self, blocks: Sequence[Item]) -> list[bytes]:
        """Enough victims to make room for the blocks, if there are enough."""
        keep = {key.parent for key, _ in blocks} | {key.digest for key, _ in blocks}
        with self._lock:
            needs, capacity = needed(blocks, self.tier), self.tier.capacity_bytes
            used = of_tenants(self.tier.groups()) if self._quotas else {}
            excess = self.tier.used_bytes + needs.total() - capacity
            lack = Lack(excess, used, needs, self._quotas.limits(needs, capacity))
            pinned = _Either(self._pinned, keep)
            doomed = self._ranks.victims(pinned, lack, Counter(used) + needs)
            self._doomed.update(doomed)
            return doomed

    def _note(self, blocks: Sequence[Item], evicted: int) -> None:
        sizes = self.tier.sizes([key.digest for key, _ in blocks])
        with self._lock:
            for (key, block), size in zip(blocks, sizes, strict=True):
                if size:  # else another process has deleted it by now
                    self._ranks.add(_resident(key, size))
                self.stats.bytes_written += block.nbytes
            self.stats.evictions += evicted

    def _renewed(self) -> bool:
        """Whether there was more to know: others may have put blocks we can evict, or evicted
        ours. With many blocks learning takes long."""
        if not self.tier.news():
            return False
        self._seed()
        return True

    def _seed(self) -> None:
        """Learn what the tier holds by now."""
        residents = list(self.tier.residents())
        with self._lock:
            self._ranks.learn(residents)


def _resident(key: BlockKey, nbytes: int) -> Resident:
    return Resident(key.digest, key.parent, nbytes, key.depth, key.tenant)


class _Either:
    """In one of two collections."""

    def __init__(self, first: Container[bytes], second: Container[bytes | None]) -> None:
        self._first, self._second = first, second

    def __contains__(self, digest: object) -> bool:
        return digest in self._first or digest in self._second
