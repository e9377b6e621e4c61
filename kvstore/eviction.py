"""Who has to go first."""

import heapq
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class EvictionPolicy(Protocol):
    """The order in which blocks have to go, tail first: each only after the blocks built on it.

    So what is left of a chain is always its beginning, which is the part that a lookup can use
    (SGLang's radix cache, 2024, and vLLM's block pool, 2023, free leaves and tails first, too).
    Policies know names, parents and sizes, do no I/O, and are not thread-safe.

    add: note a new block, as the last to go; adding it again is a use of it.
    touch: note a use of a chain, given from its head on; unknown blocks are fine.
    remove: forget a block; unknown ones are fine.
    victims: blocks in the order in which they may go, each a leaf once those before it are gone.
        The policy must not change while the iterator is in use.
    """

    def __len__(self) -> int: ...
    def __contains__(self, digest: bytes) -> bool: ...
    def add(self, digest: bytes, parent: bytes | None, nbytes: int) -> None: ...
    def touch(self, digests: Iterable[bytes]) -> None: ...
    def remove(self, digest: bytes) -> None: ...
    def nbytes(self, digest: bytes) -> int: ...
    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]: ...


@dataclass(slots=True)
class Node:
    parent: bytes | None
    nbytes: int
    time: int


class _Blocks:
    """The blocks of a policy, and how many children each has."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, Node] = OrderedDict()
        self._children: dict[bytes, int] = {}  # also of parents that are not here; never 0
        self._time = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._nodes

    def nbytes(self, digest: bytes) -> int:
        return self._nodes[digest].nbytes

    def _enter(self, digest: bytes, parent: bytes | None, nbytes: int) -> None:
        self._time += 1
        self._nodes[digest] = Node(parent, nbytes, self._time)
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def _leave(self, digest: bytes) -> bytes | None:
        """The parent, if that is a leaf now."""
        node = self._nodes.pop(digest, None)
        if node is None or node.parent is None:
            return None
        self._children[node.parent] -= 1
        if self._children[node.parent]:
            return None
        del self._children[node.parent]
        return node.parent if node.parent in self._nodes else None


class LRU(_Blocks):
    """Least recently used first; of blocks used together, the last of their chain."""

    def add(self, digest: bytes, parent: bytes | None, nbytes: int) -> None:
        """Note a new block, as the most recently used. Adding it again touches it."""
        if digest in self._nodes:
            self.touch([digest])
        else:
            self._enter(digest, parent, nbytes)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Note a use of a chain, given from its head on; its tail counts as used a bit earlier."""
        nodes, time = self._nodes, self._time
        for digest in reversed(list(digests)):
            if node := nodes.get(digest):
                time += 1
                node.time = time
                nodes.move_to_end(digest)
        self._time = time

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        self._leave(digest)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, least recently used first."""
        children = self._children.get
        gone: dict[bytes, int] = {}  # children already yielded, by parent
        for digest, newest in self._nodes.items():
            node: Node | None = newest
            # a parent that was passed over for its children follows the last of them
            while node and node.time <= newest.time and children(digest, 0) == gone.get(digest, 0):
                if digest in pinned:
                    break
                yield digest
                if node.parent is None:
                    break
                digest = node.parent
                gone[digest] = gone.get(digest, 0) + 1
                node = self._nodes.get(digest)


class FIFO(_Blocks):
    """First come, first to go, however often it was used."""

    def __init__(self) -> None:
        super().__init__()
        # first come first; a first comer with many blocks built on it is not looked at every time
        self._leaves: OrderedDict[bytes, None] = OrderedDict()

    def add(self, digest: bytes, parent: bytes | None, nbytes: int) -> None:
        """Note a new block, as the last that came. Adding it again changes nothing."""
        if digest in self._nodes:
            return
        self._enter(digest, parent, nbytes)
        if digest not in self._children:
            self._leaves[digest] = None
        if parent is not None:
            self._leaves.pop(parent, None)

    def touch(self, digests: Iterable[bytes]) -> None:
        """Uses do not matter."""

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        self._leaves.pop(digest, None)
        if (parent := self._leave(digest)) is None:
            return
        came = self._nodes[parent].time
        in_order = not self._leaves or came < self._nodes[next(iter(self._leaves))].time
        self._leaves[parent] = None
        self._leaves.move_to_end(parent, last=False)
        if not in_order:  # a block went out of turn, which is rare
            ages = sorted(self._leaves, key=lambda leaf: self._nodes[leaf].time)
            self._leaves = OrderedDict.fromkeys(ages)

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Leaves, and what becomes one, first come first."""
        late: list[tuple[int, bytes]] = []  # came after blocks that are built on them; a heap
        gone: dict[bytes, int] = {}  # children already yielded, by parent
        for leaf in self._merged(late):
            digest: bytes | None = leaf
            while digest is not None and digest not in pinned:
                yield digest
                came = self._nodes[digest].time
                digest = self._freed(self._nodes[digest].parent, gone)
                if digest is not None and self._nodes[digest].time > came:
                    heapq.heappush(late, (self._nodes[digest].time, digest))
                    break

    def _freed(self, parent: bytes | None, gone: dict[bytes, int]) -> bytes | None:
        """The parent of a block that goes, if it is the last of its children."""
        if parent is None or parent not in self._nodes:
            return None
        gone[parent] = gone.get(parent, 0) + 1
        return parent if gone[parent] == self._children[parent] else None

    def _merged(self, late: list[tuple[int, bytes]]) -> Iterator[bytes]:
        """The leaves, and in their turn those that turn up in `late` meanwhile."""
        for leaf in self._leaves:
            while late and late[0][0] < self._nodes[leaf].time:
                yield heapq.heappop(late)[1]
            yield leaf
        while late:
            yield heapq.heappop(late)[1]
