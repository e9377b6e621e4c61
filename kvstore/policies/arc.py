"""Recency and frequency, each with what room it earned."""

from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.ghosts import Ghosts
from kvstore.policies.leaves import Leaves, Rank

ONCE, AGAIN = 0, 1


@final
class ARC(Leaves):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003), of leaves and by bytes.

    Blocks that came and were not used since are kept apart from the others; from each of the two,
    the least recently used goes first, and its name is remembered. A name that returns says of
    which there should have been more: the target for the bytes of the first moves towards it,
    and the block counts as used again. While the first has more than its target, it gives.

    Names of the first are kept for what it lacks of the room, all names for one room together.
    Who asks for victims does not say for what: the target follows one insertion later than in the
    paper, and the tie that the paper breaks by what comes in is broken for the first.
    """

    def __init__(self) -> None:
        super().__init__(queues=2)
        self._again: set[bytes] = set()
        self._once_bytes = 0
        self._target: int | float = 0  # of _once_bytes
        self._ghosts = Ghosts(), Ghosts()

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block, as the most recently used. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
            return
        self._enter(digest, parent, nbytes, depth)
        if self._returns(digest, nbytes):
            self._again.add(digest)
        else:
            self._once_bytes += nbytes
        self._trim()

    def touch(self, digests: Iterable[bytes]) -> None:
        """Note a use of a chain, given from its head on; its tail counts as used a bit earlier."""
        known = self._known(digests)
        self._stamp(known)
        for digest in set(known) - self._again:
            self._once_bytes -= self._blocks[digest][1]
            self._again.add(digest)
            if self._queued.pop(digest, None):
                self._loose[digest] = None

    def remove(self, digest: bytes) -> None:
        """Forget a block but for its name; unknown ones are fine."""
        size = self._leave(digest)
        if size is None:
            return
        if digest in self._again:
            self._again.discard(digest)
            self._ghosts[AGAIN].add(digest, size)
        else:
            self._once_bytes -= size
            self._ghosts[ONCE].add(digest, size)
        self._trim()

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, from the side that has more than its share."""
        self._open()
        freed, yielded = None, 0  # bytes of those used once
        while True:
            side = ONCE if self._once_bytes - yielded > self._target else AGAIN
            digest = self._first(side, freed) or self._pop(1 - side)
            freed = None
            if digest is None:
                return
            if digest not in pinned:
                yield digest
                yielded += 0 if digest in self._again else self._blocks[digest][1]
                freed = self._freed(digest)

    def _returns(self, digest: bytes, nbytes: int) -> bool:
        """Whether a new block was here before; moves the target if so."""
        once, again = self._ghosts
        if digest in once:
            self._target += nbytes * max(1, again.nbytes / once.nbytes)
            once.discard(digest)
        elif digest in again:
            self._target -= nbytes * max(1, once.nbytes / again.nbytes)
            again.discard(digest)
        else:
            return False
        self._target = min(max(self._target, 0), self._room)
        return True

    def _trim(self) -> None:
        once, again = self._ghosts
        if (limit := self._room - self._once_bytes) < once.nbytes:
            once.trim(limit)
        if (limit := 2 * self._room - self._held - once.nbytes) < again.nbytes:
            again.trim(limit)

    def _rank(self, digest: bytes) -> Rank:
        return int(digest in self._again), self._times[digest], 0
