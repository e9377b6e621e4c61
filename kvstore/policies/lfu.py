"""Least frequently used first."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.leaves import Leaves, Rank


@final
class LFU(Leaves):
    """Least often used first; of those used as often, least recently used first.

    The textbook's: uses are counted from when a block comes until it goes, and do not age. So what
    was popular once stays long after, and what is new goes first: GDSF is the one that ages.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[bytes] = Counter()  # of the blocks that are here

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block, used once. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
        else:
            self._enter(digest, parent, nbytes, depth)
            self._uses[digest] = 1

    def touch(self, digests: Iterable[bytes]) -> None:
        """Note a use of a chain, given from its head on; its tail counts as used a bit earlier."""
        known = self._known(digests)
        self._stamp(known)
        self._uses.update(known)

    def remove(self, digest: bytes) -> None:
        """Forget a block and its uses; unknown ones are fine."""
        self._leave(digest)
        self._uses.pop(digest, None)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, least often used first."""
        return self._ascending(pinned)

    def _rank(self, digest: bytes) -> Rank:
        return 0, self._uses[digest], self._times[digest]
