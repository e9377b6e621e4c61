"""How much of a tier each tenant may have, and what nobody can take from it."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

Limits: TypeAlias = Mapping[bytes, int]  # the most bytes that tenants may have


class Quotas:
    """Limits and guaranteed shares of tenants.

    A tenant with a quota has at most so many bytes: at its quota it evicts its own blocks. Its
    guaranteed share is the quota, too, or, where the quotas of those who are there sum to more
    than the tier, its part of the tier in proportion. Tenants without a quota have no limit and no
    share. A full tier takes room from who is furthest above its share, and only as long as that
    one stays at or above it; else whoever stores evicts its own.

    Args:
        each: bytes, of every tenant without a quota of its own; None for none.
        own: bytes by tenant (see `kvstore.block.tenant_tag`).
        whole: the budget that these are bytes of. In a smaller tier a quota is the same part.
    """

    def __init__(
        self, each: int | None = None, own: Mapping[bytes, int] | None = None, *, whole: int = 0
    ) -> None:
        self._each, self._own, self._whole = each, dict(own or {}), whole

    def __bool__(self) -> bool:
        return self._each is not None or bool(self._own)

    def set(self, tenant: bytes, nbytes: int) -> None:
        """Give a tenant a quota of its own."""
        self._own[tenant] = nbytes

    def limit(self, tenant: bytes, capacity: int) -> int | None:
        """The most that a tenant may have of a tier of `capacity` bytes."""
        quota = self._own.get(tenant, self._each)
        if quota is None:
            return None
        return quota * capacity // self._whole if capacity < self._whole else quota

    def limits(self, tenants: Iterable[bytes], capacity: int) -> dict[bytes, int]:
        """Of those that have one."""
        found = ((tenant, self.limit(tenant, capacity)) for tenant in tenants)
        return {tenant: limit for tenant, limit in found if limit is not None}

    def shares(self, tenants: Iterable[bytes], capacity: int) -> dict[bytes, int]:
        """What is guaranteed to each, if these are there."""
        limits = {tenant: self.limit(tenant, capacity) or 0 for tenant in tenants}
        total = sum(limits.values())
        if total <= capacity:
            return limits
        return {tenant: limit * capacity // total for tenant, limit in limits.items()}


class Lack:
    """How many bytes have to go: of a tier, and of tenants that are at their limits.

    Args:
        excess: of the tier, with what is to come; negative where there is room.
        used, needs: of tenants, before, and to come.
        limits: of those that have one.
    """

    def __init__(
        self,
        excess: int,
        used: Mapping[bytes, int],
        needs: Mapping[bytes, int],
        limits: Limits,
    ) -> None:
        self.excess, self.storing = excess, frozenset(needs)
        self.over = {t: used.get(t, 0) + needs[t] - limits[t] for t in needs if t in limits}

    def of(self, tenant: bytes) -> bool:
        """Whether a block of this tenant has to go."""
        return self.excess > 0 or self.over.get(tenant, 0) > 0

    def gone(self, tenant: bytes, nbytes: int) -> None:
        """A block goes."""
        self.excess -= nbytes
        if tenant in self.over:
            self.over[tenant] -= nbytes

    def __bool__(self) -> bool:
        return self.excess > 0 or any(over > 0 for over in self.over.values())
