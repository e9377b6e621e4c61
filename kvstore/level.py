"""A tier under its policy: what goes in, what has to go for it, and what may not."""

import threading
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from kvstore.audit import AuditReport, audit_tier
from kvstore.block import BlockKey
from kvstore.errors import DeviceFull, MissingParent, TierFull
from kvstore.eviction import POLICIES, PolicyName
from kvstore.policies.lru import LRU
from kvstore.stats import TierStats
from kvstore.tier import Item, Tier


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
    ) -> None:
        self.tier = tier
        self.stats = TierStats(capacity_bytes=tier.capacity_bytes)
        self._lock = lock  # guards everything below
        self._pinned = pinned
        self._make_policy = POLICIES[policy]
        self._policy = self._make_policy()
        self._doomed: set[bytes] = set()
        self._inserting = threading.Lock()
        self._seed()

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
            self._policy.touch([key.digest for key in keys])
            self.tier.touched([key.digest for key in reversed(keys)])

    def insert(self, blocks: Sequence[Item]) -> int:
        """Store absent blocks, evicting as needed; how many of `blocks` are here afterwards.

        Blocks for which there is no room beside pinned ones, and those built on them, are
        skipped and counted. Raises StoreError if the device fails.
        """
        with self._inserting:
            blocks = self._absent(blocks)
            try:
                self._put(blocks)
            except DeviceFull:
                raise
            except (TierFull, MissingParent):
                self._seed()  # other processes may have put blocks we can evict
                self._put_singly(blocks)
            return sum(self.tier.held([key for key, _ in blocks]))

    def room(self, pinned: Iterable[bytes]) -> int:
        """Bytes that insertions may take now: all but those of pinned blocks."""
        with self._lock:
            here = [digest for digest in pinned if digest in self._policy]
            return self.tier.capacity_bytes - sum(map(self._policy.nbytes, here))

    def skip(self, count: int) -> None:
        """Count blocks that were not offered to the tier."""
        with self._lock:
            self.stats.skipped += count

    def delete(self, keys: Sequence[BlockKey | bytes]) -> int:
        """Delete blocks, pinned or not, and what rests on them; how many of `keys` were here."""
        with self._inserting:
            present = [key for key in keys if key in self.tier]
            if present:
                self.tier.delete(self._with_rest(present))
                self._seed()
            return len(present)

    def clear(self) -> None:
        with self._inserting:
            self.tier.clear()
            with self._lock:
                self._policy = self._make_policy()
            self._seed()

    def audit(self, repair: bool) -> AuditReport:
        """Audit the tier; learn anew what it holds if that may have changed."""
        with self._inserting:
            report = audit_tier(self.tier, repair)
            if repair:
                self._seed()
            return report

    def snapshot(self) -> TierStats:
        with self._lock:
            return replace(
                self.stats, used_bytes=self.tier.used_bytes, blocks=len(self._policy),
                corrupt=self.tier.corrupt, quarantined=self.tier.quarantined,
            )  # fmt: skip

    def _with_rest(self, keys: Sequence[BlockKey | bytes]) -> list[bytes]:
        """Digests of blocks, and of all that rests on them here."""
        rests_on: dict[bytes | None, list[bytes]] = defaultdict(list)
        for resident in self.tier.residents():
            rests_on[resident.parent].append(resident.digest)
        found = [key if isinstance(key, bytes) else key.digest for key in keys]
        for digest in found:
            found += rests_on.pop(digest, ())
        return found

    def _absent(self, blocks: Sequence[Item]) -> list[Item]:
        blocks = list({key: (key, block) for key, block in blocks}.values())
        present = self.tier.held([key for key, _ in blocks])
        return [item for item, there in zip(blocks, present, strict=True) if not there]

    def _put_singly(self, blocks: Sequence[Item]) -> None:
        """As many as have room; none without those before it, which a lookup needs first."""
        skipped: set[bytes | None] = set()
        for item in blocks:
            key = item[0]
            try:
                if key.parent not in skipped:
                    self._put([item])
                    continue
            except DeviceFull:
                raise
            except (TierFull, MissingParent):
                pass
            skipped.add(key.digest)
        with self._lock:
            self.stats.skipped += len(skipped)

    def _put(self, blocks: Sequence[Item]) -> None:
        if not blocks:
            return
        victims = self._doom(blocks)
        gone: list[bytes] = []
        try:
            gone = self.tier.put(blocks, victims)
        finally:
            with self._lock:
                self._doomed.difference_update(victims)
                for digest in gone:
                    self._policy.remove(digest)
        self._note(blocks, len(gone))

    def _doom(self, blocks: Sequence[Item]) -> list[bytes]:
        """Enough victims to make room for the blocks, if there are enough."""
        keep = {key.parent for key, _ in blocks} | {key.digest for key, _ in blocks}
        with self._lock:
            need = sum(self.tier.cost(key, block) for key, block in blocks)
            excess = self.tier.used_bytes + need - self.tier.capacity_bytes
            doomed: list[bytes] = []
            victims = self._policy.victims(_Either(self._pinned, keep))
            while excess > 0 and (digest := next(victims, None)) is not None:
                excess -= self._policy.nbytes(digest)
                doomed.append(digest)
            self._doomed.update(doomed)
            return doomed

    def _note(self, blocks: Sequence[Item], evicted: int) -> None:
        sizes = self.tier.sizes([key.digest for key, _ in blocks])
        with self._lock:
            for (key, block), size in zip(blocks, sizes, strict=True):
                self._policy.add(key.digest, key.parent, size, key.depth)
                self.stats.bytes_written += block.nbytes
            self.stats.evictions += evicted

    def _seed(self) -> None:
        """Learn what the tier holds by now; of what stayed, the policy knows what it knew.

        The order of `residents` is by use in all processes: better than what LRU knows of others.
        """
        residents = list(self.tier.residents())
        with self._lock:
            for digest in set(self._policy).difference(x.digest for x in residents):
                self._policy.remove(digest)
            fresh = [resident for resident in residents if resident.digest not in self._policy]
            if fresh and isinstance(self._policy, LRU):
                self._policy, fresh = LRU(), residents
            for resident in fresh:
                self._policy.add(*resident[:-1])


class _Either:
    """In one of two collections."""

    def __init__(self, first: Container[bytes], second: Container[bytes | None]) -> None:
        self._first, self._second = first, second

    def __contains__(self, digest: object) -> bool:
        return digest in self._first or digest in self._second
