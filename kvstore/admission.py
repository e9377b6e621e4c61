"""What a tier whose writes cost something takes in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from kvstore.policies.ghosts import Ghosts
from kvstore.tier import Resident

AdmissionName: TypeAlias = Literal["always", "second-sight"]


class SecondSight:
    """A block that something would have to be evicted for comes in when it is seen again.

    Most blocks are never used again, and to write them wears a disk out and drives others from it.
    While there is room, all come in. Names of those that did not, and of those that went, are
    remembered, for as many bytes as the tier has; who is among them was seen before. A block
    comes in only behind its parent: without that no lookup could reach it.

    Args:
        capacity_bytes: of the tier.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._seen = Ghosts()

    def choose(
        self,
        offers: Sequence[Resident],
        free: int,
        left: Mapping[bytes, int],
        here: Callable[[bytes], bool],
    ) -> list[bool]:
        """Which of these absent blocks come in, given parents first.

        Args:
            free: bytes that may be had without evicting.
            left: the same, of tenants that have limits.
            here: whether a block is in the tier.
        """
        own, chosen, coming = dict(left), list[bool](), set[bytes]()
        for offer in offers:
            most = min(free, own.get(offer.tenant, free))
            above = offer.parent
            reachable = above is None or above in coming or here(above)
            comes = reachable and (offer.nbytes <= most or offer.digest in self._seen)
            chosen.append(comes)
            if not comes:
                self.gone(offer.digest, offer.nbytes)
                continue
            coming.add(offer.digest)
            self._seen.discard(offer.digest)
            free = max(0, free - offer.nbytes)
            if offer.tenant in own:
                own[offer.tenant] = max(0, own[offer.tenant] - offer.nbytes)
        return chosen

    def gone(self, digest: bytes, nbytes: int) -> None:
        """Remember a block that was evicted, or did not come in."""
        self._seen.add(digest, nbytes)
        self._seen.trim(self._capacity)
