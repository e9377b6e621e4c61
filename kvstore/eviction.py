"""Who has to go first."""

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Node:
    parent: bytes | None
    nbytes: int
    time: int
    children: int = 0


class LRU:
    """Least recently used, tail first: a block goes only after the blocks built on it.

    So what is left of a chain is always its beginning, which is the part that a lookup can use
    (SGLang's radix cache, 2024, and vLLM's block pool, 2023, free leaves and tails first, too).
    Knows names, parents and sizes, does no I/O, and is not thread-safe.
    """

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, Node] = OrderedDict()  # least recently used first
        self._children: Counter[bytes] = Counter()  # also of parents that are not here
        self._time = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._nodes

    def add(self, digest: bytes, parent: bytes | None, nbytes: int) -> None:
        """Note a new block, as the most recently used. Adding it again touches it."""
        if digest not in self._nodes:
            self._nodes[digest] = Node(parent, nbytes, 0)
            if parent is not None:
                self._children[parent] += 1
        self.touch([digest])

    def touch(self, digests: Iterable[bytes]) -> None:
        """Note a use of a chain, given from its head on; its tail counts as used a bit earlier."""
        for digest in reversed(list(digests)):
            if node := self._nodes.get(digest):
                self._time += 1
                node.time = self._time
                self._nodes.move_to_end(digest)

    def remove(self, digest: bytes) -> None:
        """Forget a block; unknown ones are fine."""
        node = self._nodes.pop(digest, None)
        if node is None or node.parent is None:
            return
        self._children[node.parent] -= 1
        if not self._children[node.parent]:
            del self._children[node.parent]

    def nbytes(self, digest: bytes) -> int:
        return self._nodes[digest].nbytes

    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]:
        """Blocks in the order in which they may go: each is a leaf once those before it are gone.

        The LRU must not change while the iterator is in use.
        """
        gone: Counter[bytes] = Counter()  # children already yielded, by parent
        for digest, newest in self._nodes.items():
            node: Node | None = newest
            # a parent that was passed over for its children follows the last of them
            while node and node.time <= newest.time and self._children[digest] == gone[digest]:
                if digest in pinned:
                    break
                yield digest
                if node.parent is None:
                    break
                digest = node.parent
                gone[digest] += 1
                node = self._nodes.get(digest)
