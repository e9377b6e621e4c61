"""What is cheapest to compute again, for its size and uses, first."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.leaves import Leaves, Rank

DEPTH = 64  # blocks before one at which attention to them costs as much as all else


@final
class GDSF(Leaves):
    """Greedy Dual Size Frequency (Cherkasova 1998), of leaves: least clock + uses x cost / bytes.

    The clock is the highest rank of what was evicted so far, and a block takes it over when it is
    used, so ranks age. The cost is the time to compute a block again, in that of the first one
    of a chain: one, and a part for attention that grows with its depth. So deep blocks rank
    above those they rest on, which yet cannot go before them: a chain is worth what its leaf is.

    Args:
        depth: of the block that costs twice as much as the first.
    """

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self._clock = 0.0
        self._clocks: dict[bytes, float] = {}  # the clock at a block's last use
        self._uses: Counter[bytes] = Counter()
        self._depths: dict[bytes, int] = {}  # of blocks whose chain is known to its head
        self._doubling = depth

    def add(self, digest: bytes, parent: bytes | None, nbytes: int) -> None:
        """Note a new block, used once. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
        else:
            self._enter(digest, parent, nbytes)
            self._clocks[digest] = self._clock
            self._uses[digest] = 1

    def touch(self, digests: Iterable[bytes]) -> None:
        """Note a use of blocks."""
        known = self._known(digests)
        self._stamp(known)
        self._clocks.update(dict.fromkeys(known, self._clock))
        self._uses.update(known)

    def remove(self, digest: bytes) -> None:
        """Forget a block and its uses; unknown ones are fine."""
        if self._leave(digest) is not None:
            for known in (self._clocks, self._uses, self._depths):
                known.pop(digest, None)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, least worth first; the clock follows."""
        for digest in self._ascending(pinned):
            self._clock = max(self._clock, self._rank(digest)[1])
            yield digest

    def _rank(self, digest: bytes) -> Rank:
        depth = self._depths.get(digest)
        cost = 1 + (self._depth(digest) if depth is None else depth) / self._doubling
        worth = self._uses[digest] * cost / self._blocks[digest][1]
        return 0, self._clocks[digest] + worth, self._times[digest]

    def _depth(self, digest: bytes) -> int:
        """Blocks before one, as far as they are here."""
        above: list[bytes] = []
        at: bytes | None = digest
        while at is not None and at in self._blocks and at not in self._depths:
            above.append(at)
            at = self._blocks[at][0]
        if at is not None and at not in self._blocks:
            return len(above) - 1  # its beginning may come yet
        depth = -1 if at is None else self._depths[at]
        self._depths.update(
            zip(reversed(above), range(depth + 1, depth + 1 + len(above)), strict=True)
        )
        return self._depths[digest]
