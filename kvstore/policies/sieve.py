"""A hand that passes over what was used."""

from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.leaves import Leaves, Rank


@final
class SIEVE(Leaves):
    """SIEVE (Zhang et al., NSDI 2024), of leaves.

    A hand goes from the block that came first to the one that came last, and begins again; also
    where others came since it stood at the last, or it would only look at what is new from there
    on. What was not used since it passed, goes; what was, stays where it is, and its mark is wiped.
    A leaf stands for the run of blocks above that nothing else rests on: their marks are wiped with
    its own, as the hand would pass them in the same round. When a leaf goes, the hand looks at its
    parent next, which came earlier.
    """

    def __init__(self) -> None:
        super().__init__()
        self._used: set[bytes] = set()  # since the hand passed
        self._round = 0
        self._last = 0  # when the last block came that was here when the hand moved
        self._rounds: dict[bytes, int] = {}  # in which the hand comes to a block next

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block, as the last that came. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
        else:
            self._enter(digest, parent, nbytes, depth)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Mark blocks as used."""
        self._used.update(self._known(digests))

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        self._leave(digest)
        self._used.discard(digest)
        self._rounds.pop(digest, None)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, as the hand comes to them; marks are wiped for good."""
        self._open()
        last, self._last = self._last, self._now
        digest = self._pop()
        while digest is not None:
            freed = None
            if digest not in pinned:
                self._round = max(self._round, self._rounds.get(digest, 0))
                new, last = self._times[digest] > last, self._now
                if new:  # when it came, the hand stood at the last one
                    self._round += 1
                    self._push(digest)
                elif digest in self._used:
                    self._pass(digest)
                else:
                    yield digest
                    freed = self._freed(digest)
            digest = self._first(0, freed)

    def _pass(self, leaf: bytes) -> None:
        for digest in self._run(leaf):
            if digest not in self._used:
                break
            self._used.discard(digest)
        self._rounds[leaf] = self._round + 1
        self._push(leaf)

    def _rank(self, digest: bytes) -> Rank:
        return 0, max(self._round, self._rounds.get(digest, 0)), self._times[digest]
