"""Deletions, and who carries blocks from one tier to another meanwhile."""

import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

from kvstore.tier import Item


class Passage:
    """So that nobody brings back, from a tier where it still is, what another has deleted."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._carriers: set[object] = set()
        self._going: list[frozenset[bytes]] = []

    @contextmanager
    def carrying(self) -> Iterator[frozenset[bytes]]:
        """Digests that must not be carried, as they are being deleted."""
        me = object()
        with self._changed:
            self._carriers.add(me)
            going = frozenset[bytes]().union(*self._going)
        try:
            yield going
        finally:
            with self._changed:
                self._carriers.discard(me)
                self._changed.notify_all()

    @contextmanager
    def deleting(self, digests: Sequence[bytes]) -> Iterator[None]:
        """Nobody carries these; begins when all have arrived who set out before."""
        going = frozenset(digests)
        with self._changed:
            self._going.append(going)
            before = set(self._carriers)
            self._changed.wait_for(lambda: before.isdisjoint(self._carriers))
        try:
            yield
        finally:
            with self._changed:
                self._going.remove(going)


def staying(blocks: Sequence[Item], going: Container[bytes | None]) -> list[Item]:
    """Blocks, given parents first, without those that are going and what rests on them."""
    left: set[bytes | None] = set()
    kept = []
    for item in blocks:
        key = item[0]
        if key.digest in going or key.parent in going or key.parent in left:
            left.add(key.digest)
        else:
            kept.append(item)
    return kept
