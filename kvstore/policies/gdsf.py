"""What is cheapest to compute again, for its size and uses, first."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import final

from kvstore.policies.leaves import Leaves, Rank

DEPTH = 512  # blocks of 64 tokens: there attention costs an 8B Llama as much as all else


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
        self._depth = depth

    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None:
        """Note a new block, used once. Adding it again touches it."""
        if digest in self._blocks:
            self.touch([digest])
        else:
            self._enter(digest, parent, nbytes, depth)
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
        self._leave(digest)
        self._clocks.pop(digest, None)
        self._uses.pop(digest, None)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, least worth first; the clock follows."""
        for digest in self._ascending(pinned):
            self._clock = max(self._clock, self._rank(digest)[1])
            yield digest

    def _rank(self, digest: bytes) -> Rank:
        _, nbytes, depth = self._blocks[digest]
        worth = self._uses[digest] * (1 + depth / self._depth) / nbytes
        return 0, self._clocks[digest] + worth, self._times[digest]
