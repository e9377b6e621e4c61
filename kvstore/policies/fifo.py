"""First in, first out."""

from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.leaves import Leaves, Rank


@final
class FIFO(Leaves):
    """First come, first to go, however often it was used."""

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block, as the last that came. Adding it again changes nothing."""
        if digest not in self._blocks:
            self._enter(digest, parent, nbytes, depth)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Uses do not matter."""

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        self._leave(digest)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, first come first."""
        return self._ascending(pinned)

    def _rank(self, digest: bytes) -> Rank:
        return 0, self._times[digest], 0
