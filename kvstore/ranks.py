"""The blocks of a tier in the order in which they have to go."""

from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence

from kvstore.eviction import POLICIES, EvictionPolicy, PolicyName
from kvstore.policies.lru import LRU
from kvstore.quotas import Lack, Quotas
from kvstore.tier import Resident

ALL = b""  # instead of a tenant, where all are in one order


class Ranks:
    """A policy for all blocks, or where there are quotas one for each tenant's.

    No block rests on another tenant's, so each tenant's go tail first among themselves.
    """

    def __init__(self, policy: PolicyName, quotas: Quotas, capacity_bytes: int) -> None:
        self.make = POLICIES[policy]
        self._quotas, self._capacity = quotas, capacity_bytes
        self._divided = bool(quotas)
        self._owners: dict[bytes, bytes] = {}
        self._policies: dict[bytes, EvictionPolicy] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._owners)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._owners

    def nbytes(self, digest: bytes) -> int:
        return self._policies[self._owners[digest]].nbytes(digest)

    def owner(self, digest: bytes) -> bytes:
        """Whose a block is, where there are quotas."""
        return self._owners[digest]

    def add(self, block: Resident) -> None:
        """Note a new block; adding it again is a use."""
        owner = self._owners.setdefault(block.digest, block.tenant if self._divided else ALL)
        if owner not in self._policies:
            self._policies[owner] = self.make()
        self._policies[owner].add(block.digest, block.parent, block.nbytes, block.depth)

    def touch(self, chain: Sequence[bytes]) -> None:
        """Note a use of a chain, given from its head on; unknown blocks are fine."""
        owner = next((self._owners[x] for x in chain if x in self._owners), None)
        if owner is not None:
            self._policies[owner].touch(chain)

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        owner = self._owners.pop(digest, None)
        if owner is not None:
            self._policies[owner].remove(digest)

    def learn(self, residents: Sequence[Resident]) -> None:
        """These are there, least recently used first; of what stayed, what is known stays.

        Their order is by use in all processes: better than what LRU knows of others.
        """
        if self._divided != bool(self._quotas):
            self._divided = bool(self._quotas)
            self.forget()
        for digest in set(self).difference(resident.digest for resident in residents):
            self.remove(digest)
        fresh = [resident for resident in residents if resident.digest not in self]
        if fresh and self.make is LRU:
            self.forget()
            fresh = list(residents)
        for resident in fresh:
            self.add(resident)

    def forget(self) -> None:
        """Begin anew, with no block."""
        self._owners.clear()
        self._policies.clear()

    def victims(
        self, pinned: Container[bytes], lack: Lack, used: Mapping[bytes, int]
    ) -> list[bytes]:
        """Blocks to evict, in this order, so that nothing lacks; fewer if there are not enough.

        Args:
            used: bytes of each tenant, with those that are to come.
        """
        choice = _Choice(self._policies, pinned, lack, Counter(used))
        if not self._divided:
            while lack and choice.take(ALL):
                pass
            return choice.doomed
        for tenant in lack.over:
            while lack.over[tenant] > 0 and choice.take(tenant):
                pass
        shares = self._quotas.shares([t for t in used if used[t] > 0], self._capacity)
        choice.take_shared(shares, sorted(lack.storing))
        return choice.doomed


class _Choice:
    """Who has to go for one insertion."""

    def __init__(
        self,
        policies: Mapping[bytes, EvictionPolicy],
        pinned: Container[bytes],
        lack: Lack,
        used: Counter[bytes],
    ) -> None:
        self.doomed: list[bytes] = []
        self._policies, self._lack, self._used = policies, lack, used
        self._queues = {tenant: policy.victims(pinned) for tenant, policy in policies.items()}

    def take(self, tenant: bytes, floor: int | None = None) -> bool:
        """Doom a tenant's next block; False if there is none, or it would fall below `floor`."""
        digest = next(self._queues.get(tenant, iter(())), None)
        if digest is None:
            return False
        nbytes = self._policies[tenant].nbytes(digest)
        if floor is not None and self._used[tenant] - nbytes < floor:
            return False
        self.doomed.append(digest)
        self._used[tenant] -= nbytes
        self._lack.gone(tenant, nbytes)
        return True

    def take_shared(self, shares: Mapping[bytes, int], mine: Collection[bytes]) -> None:
        """Doom blocks of who is furthest above its share; then, of those who store."""
        others = set(self._queues)
        while self._lack.excess > 0 and others:
            above = {tenant: self._used[tenant] - shares.get(tenant, 0) for tenant in others}
            tenant = max(above, key=lambda t: (above[t], t))
            if above[tenant] <= 0:
                break
            if not self.take(tenant, None if tenant in mine else shares.get(tenant, 0)):
                others.discard(tenant)
        for tenant in mine:
            while self._lack.excess > 0 and self.take(tenant):
                pass
