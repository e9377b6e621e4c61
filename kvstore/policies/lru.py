"""Least recently used first."""

from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.leaves import Leaves, Rank


@final
class LRU(Leaves):
    """Least recently used first; of blocks used together, the last of their chain."""

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block, as the most recently used. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
        else:
            self._enter(digest, parent, nbytes, depth)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Note a use of a chain, given from its head on; its tail counts as used a bit earlier."""
        self._stamp(self._known(digests))

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        self._leave(digest)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, least recently used first."""
        return self._ascending(pinned)

    def _rank(self, digest: bytes) -> Rank:
        return 0, self._times[digest], 0
