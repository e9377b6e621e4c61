"""Three queues, first in first out."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.ghosts import Ghosts
from kvstore.policies.leaves import Leaves, Rank

SHARE = 0.1  # of the room is for the small queue
MOST_USES = 3  # are counted
SMALL, MAIN = 0, 1


@final
class S3FIFO(Leaves):
    """S3-FIFO (Yang et al., SOSP 2023), of leaves.

    A block comes to the small queue. There, in its turn, it goes unless it was used more than once,
    which brings it to the main queue with no uses. Names of those that went are remembered, for as
    many bytes as the main queue has room for; who returns meanwhile comes to the main queue. There,
    in its turn, a block that was used begins anew at the end, with one use less. The small
    queue's turn is when it has a tenth of the room or more, counting blocks that are no leaves.

    A leaf stands for the run of blocks above that nothing else rests on: they move and lose uses
    with it. A block that becomes a leaf has its turn when its age says, which is at once.
    """

    def __init__(self) -> None:
        super().__init__(queues=2)
        self._main: set[bytes] = set()
        self._small_bytes = 0
        self._uses: Counter[bytes] = Counter()  # not yet cut to MOST_USES
        self._ghosts = Ghosts()

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
            return
        self._enter(digest, parent, nbytes, depth)
        if self._ghosts.discard(digest):
            self._main.add(digest)
        else:
            self._small_bytes += nbytes

    def touch(self, digests: Iterable[bytes]) -> None:
        """Count a use of blocks."""
        self._uses.update(self._known(digests))

    def remove(self, digest: bytes) -> None:
        """Forget a block but for its name; unknown ones are fine."""
        size = self._leave(digest)
        if size is None:
            return
        self._uses.pop(digest, None)
        if digest in self._main:
            self._main.discard(digest)
        else:
            self._small_bytes -= size
            self._ghosts.add(digest, size)
        self._ghosts.trim(int((1 - SHARE) * self._room))

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, in the turn of their queues; uses are spent for good."""
        self._open()
        freed, yielded = None, 0  # bytes of the small queue
        while True:
            queue = SMALL if self._small_bytes - yielded >= SHARE * self._room else MAIN
            digest = self._first(queue, freed) or self._pop(1 - queue)
            freed = None
            if digest is None:
                return
            if digest not in pinned and not self._stays(digest):
                yield digest
                yielded += 0 if digest in self._main else self._blocks[digest][1]
                freed = self._freed(digest)

    def _stays(self, leaf: bytes) -> bool:
        """Whether a leaf was used enough; if so it and its run begin anew in the main queue."""
        stays = self._spend(leaf) if leaf in self._main else self._promote(leaf)
        if stays:
            self._now += 1
            self._times[leaf] = self._now
            self._push(leaf)
        return stays

    def _spend(self, leaf: bytes) -> bool:
        if not self._uses[leaf]:
            return False
        for digest in self._run(leaf):
            if digest not in self._main or not self._uses[digest]:
                break
            self._uses[digest] = min(self._uses[digest], MOST_USES) - 1
        return True

    def _promote(self, leaf: bytes) -> bool:
        if self._uses[leaf] < 2:
            return False
        for digest in self._run(leaf):
            if digest in self._main or self._uses[digest] < 2:
                break
            self._main.add(digest)
            self._small_bytes -= self._blocks[digest][1]
            self._uses[digest] = 0
            self._queued.pop(digest, None)  # in the other queue
        return True

    def _rank(self, digest: bytes) -> Rank:
        return int(digest in self._main), self._times[digest], 0
