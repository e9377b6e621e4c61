"""Policies that give every block a rank."""

from abc import ABC
from collections.abc import Container, Iterator

from kvstore.policies.leaves import Leaves


class Ranked(Leaves, ABC):
    """The leaf of least rank goes first. What is done to other blocks does not change a rank."""

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, least rank first."""
        self._open()
        heap = self._heaps[0]
        digest = self._pop()
        while digest is not None:
            freed = None
            if digest not in pinned:
                self._note_victim(digest)
                yield digest
                freed = self._freed(digest)
            if freed is None or (heap and heap[0][0] < self._rank(freed)):
                ...
