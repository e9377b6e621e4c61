"""What a tier whose writes cost something takes in."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Literal, TypeAlias

from kvstore.policies.ghosts import Ghosts
from kvstore.tier import Resident

AdmissionName: TypeAlias = Literal["always", "second-sight"]


class SecondSight:
    """A block that something would have to be evicted for comes in when it is seen again.

    Most blocks are never used again, and to write them wears a disk out and drives others from it.
    While there is room, all come in. Names of those that did not, and of those that went, are
    remembered, for as many bytes as the tier has; who is among them was seen before. A block
    comes in only behind its parent: without that no lookup could reach it. What is offered just
    because others rest on it was not seen again by that.

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
        below: Container[bytes] = (),
    ) -> list[bool]:
        """Which of these absent blocks come in, given parents first.

        Args:
            free: bytes that may be had without evicting.
            left: the same, of tenants that have limits.
            here: whether a block is in the tier.
            below: offers that others of them rest on, and that are here for no other reason.
        """
        own, chosen, coming = dict(left), list[bool](), set[bytes]()
        wanted = self._wanted(offers, below)
        for offer in offers:
            most = min(free, own.get(offer.tenant, free))
            above = offer.parent
            reachable = above is None or above in coming or here(above)
            again = offer.digest in self._seen and (
                offer.digest not in below or offer.digest in wanted
            )
            comes = reachable and (offer.nbytes <= most or again)
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

    def _wanted(self, offers: Sequence[Resident], below: Container[bytes]) -> set[bytes]:
        """Offers that have been seen in their own right, and those that they rest on."""
        parents = {offer.digest: offer.parent for offer in offers}
        found: set[bytes] = set()
        for digest in parents:
            above: bytes | None = digest
            if digest in self._seen and digest not in below:
                while above in parents and above not in found:
                    found.add(above)
                    above = parents[above]
        return found

    def gone(self, digest: bytes, nbytes: int) -> None:
        """Remember a block that was evicted, or did not come in."""
        self._seen.add(digest, nbytes)
        self._seen.trim(self._capacity)
