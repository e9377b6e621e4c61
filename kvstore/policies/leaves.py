"""Blocks, what rests on them, and queues of those on which nothing does."""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import TypeAlias

Rank: TypeAlias = tuple[int, int | float, int]  # number of the queue, then least first
Entry: TypeAlias = tuple[Rank, bytes]


class Leaves(ABC):
    """What every policy is built on: only a leaf can go, and may make its parent one.

    Queues are heaps, and lazy. A block enters when `victims` is called next, and stays where it is
    when it is used or another is built on it; whoever takes the first entry sees that it is of
    a block that left, or is no leaf, or ranks later by now. So ranks may only grow, and uses cost
    no more than writing them down: most blocks are used often, and are no leaves.
    """

    def __init__(self, queues: int = 1) -> None:
        self._blocks: dict[bytes, tuple[bytes | None, int, int]] = {}  # parent, bytes, depth
        self._times: dict[bytes, int] = {}  # when a block came, or was used, as the policy wants
        self._now = 0
        self._held = 0  # bytes
        self._room = 0  # most bytes ever held: the capacity, once anything had to go
        self._children: dict[bytes, int] = {}  # also of parents that are not here; never 0
        self._heaps: list[list[Entry]] = [[] for _ in range(queues)]
        self._queued: dict[bytes, Entry] = {}  # which entry of a block counts
        self._loose: dict[bytes, None] = {}  # not queued yet, if leaves at all
        self._aside: list[bytes] = []  # taken from the queues by `victims`
        self._gone: dict[bytes, int] = {}  # how many children it has yielded, by parent

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._blocks)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blocks

    def nbytes(self, digest: bytes) -> int:
        return self._blocks[digest][1]

    @abstractmethod
    def _rank(self, digest: bytes) -> Rank:
        """Where a leaf belongs, in which queue."""

    def _enter(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int) -> None:
        self._blocks[digest] = parent, nbytes, depth
        self._now = self._times[digest] = self._now + 1
        self._held += nbytes
        if self._held > self._room:
            self._room = self._held
        self._loose[digest] = None
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def _leave(self, digest: bytes) -> int | None:
        """Forget a block; its size, None if it is unknown."""
        if digest not in self._blocks:
            return None
        parent, nbytes, _ = self._blocks.pop(digest)
        del self._times[digest]
        self._held -= nbytes
        self._loose.pop(digest, None)
        self._queued.pop(digest, None)
        if parent is not None:
            self._orphan(parent)
        return nbytes

    def _orphan(self, parent: bytes) -> None:
        """Count one child less."""
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        if parent in self._blocks and parent not in self._queued:
            self._loose[parent] = None

    def _known(self, digests: Iterable[bytes]) -> list[bytes]:
        blocks = self._blocks
        return [digest for digest in digests if digest in blocks]

    def _stamp(self, chain: Sequence[bytes]) -> None:
        """Known blocks of a chain have been used now, its tail a bit earlier."""
        now = self._now
        self._times.update(zip(reversed(chain), range(now + 1, now + 1 + len(chain)), strict=True))
        self._now = now + len(chain)

    def _open(self) -> None:
        """Queue all leaves that are in no queue. To begin `victims` with."""
        self._gone = {}
        for digest in (*self._aside, *self._loose):
            if digest in self._blocks and digest not in self._children:
                self._push(digest)
        self._aside.clear()
        self._loose.clear()
        for heap in self._heaps:
            if len(heap) > 2 * len(self._queued) + 64:
                heap[:] = [entry for entry in heap if self._queued.get(entry[1]) is entry]
                heapify(heap)

    def _push(self, digest: bytes) -> None:
        """Queue a leaf, or one that is none until those yielded are gone."""
        rank = self._rank(digest)
        self._queued[digest] = entry = rank, digest
        heappush(self._heaps[rank[0]], entry)

    def _pop(self, queue: int = 0) -> bytes | None:
        """The first leaf of a queue; it is not queued any more."""
        heap, queued, children, gone = self._heaps[queue], self._queued, self._children, self._gone
        while heap:
            entry = heappop(heap)
            digest = entry[1]
            if queued.get(digest) is not entry:
                continue
            del queued[digest]
            if children.get(digest, 0) != gone.get(digest, 0):
                continue
            if heap and heap[0][0] < self._rank(digest):
                self._push(digest)
                continue
            self._aside.append(digest)
            return digest
        return None

    def _freed(self, digest: bytes) -> bytes | None:
        """The parent of a block that was yielded, if that was the last of its children."""
        parent = self._blocks[digest][0]
        if parent is None or parent not in self._blocks:
            return None
        self._gone[parent] = gone = self._gone.get(parent, 0) + 1
        return parent if gone == self._children[parent] else None

    def _first(self, queue: int, freed: bytes | None) -> bytes | None:
        """As `_pop`, once `freed` is queued, if any; fast where that comes first, as usual."""
        if freed is None:
            return self._pop(queue)
        rank, heap = self._rank(freed), self._heaps[queue]
        if rank[0] != queue or (heap and heap[0][0] < rank):
            self._push(freed)
            return self._pop(queue)
        self._queued.pop(freed, None)
        self._aside.append(freed)
        return freed

    def _ascending(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Victims of a policy with one queue: leaves, and what becomes one, least rank first."""
        self._open()
        digest = self._pop()
        while digest is not None:
            freed = None
            if digest not in pinned:
                yield digest
                freed = self._freed(digest)
            digest = self._first(0, freed)

    def _run(self, leaf: bytes) -> Iterator[bytes]:
        """A leaf, and the blocks above it on which nothing else rests, less what was yielded."""
        digest: bytes | None = leaf
        while digest is not None and digest in self._blocks:
            yield digest
            digest = self._blocks[digest][0]
            if digest and self._children[digest] - self._gone.get(digest, 0) != 1:
                return
