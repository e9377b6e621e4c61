"""Deletions, and who carries blocks from one tier to another meanwhile."""

import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from weakref import WeakSet

from kvstore.tier import Item

WAIT_S = 1.0  # until carriers are counted again: one that was interrupted tells nobody


class _Carrier:
    """One that is on its way; gone with the frame that holds it, however that ends."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()


class Passage:
    """So that nobody brings back, from a tier where it still is, what another has deleted."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._carriers = WeakSet[_Carrier]()
        self._going: list[frozenset[bytes]] = []

    @contextmanager
    def carrying(self) -> Iterator[frozenset[bytes]]:
        """Digests that must not be carried, as they are being deleted."""
        me = _Carrier()
        try:
            with self._changed:
                self._carriers.add(me)
                going = frozenset[bytes]().union(*self._going)
            yield going
        finally:
            with self._changed:
                self._carriers.discard(me)
                self._changed.notify_all()

    @contextmanager
    def deleting(self, digests: Sequence[bytes]) -> Iterator[None]:
        """Nobody carries these; begins when all have arrived who set out before."""
        going = frozenset(digests)
        try:
            with self._changed:
                self._going.append(going)
                before = WeakSet(self._carriers)
                while any(x in self._carriers and x.thread.is_alive() for x in before):
                    self._changed.wait(WAIT_S)
            yield
        finally:
            with self._changed, suppress(ValueError):  # interrupted before it was there
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
